// A picture is as wide as the page, on a phone too; a tap opens it alone, to be enlarged.
document.addEventListener("DOMContentLoaded", () => {
  for (const picture of document.querySelectorAll("article p > img")) {
    const link = document.createElement("a");
    link.href = picture.src;
    link.title = "Open the picture";
    picture.replaceWith(link);
    link.append(picture);
  }
});
