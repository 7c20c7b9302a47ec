// Fills the list of versions with those that the published site has: window.negcacheVersions, from versions.js. Without
// it, where one version stands alone, the list has that one.
{
  const box = document.querySelector(".sidebar-versions");
  const list = box.querySelector("select");
  const { version, page } = box.dataset;
  const root = new URL(`${document.documentElement.dataset.content_root}../`, location.href);
  const published = window.negcacheVersions || [];
  const versions = published.includes(version) ? published : [version, ...published];
  if (versions.length > 1) {
    list.replaceChildren(...versions.map((each) => new Option(each, each, false, each === version)));
    list.disabled = false;
  }
  list.addEventListener("change", async () => {
    const home = new URL(`${list.value}/index.html`, root);
    const same = new URL(`${list.value}/${page}`, root);
    // A page may be missing there; files cannot be asked.
    const found = await fetch(same, { method: "HEAD" }).catch(() => ({ ok: false }));
    location.href = found.ok ? same : home;
  });
}
