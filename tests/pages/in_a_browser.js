// Returns what is wrong with the page as it is shown now, as lines of text. Run by in_a_browser.py.
const [onDesk] = arguments;
const LEAST_CONTRAST = 4.5; // WCAG 2.2, level AA, for text of any size
const MOST_APART = 1.3; // contrast of a picture's ground with the page: no white box on a dark page
const faults = [];
const article = document.querySelector("article") || document.body;

function name(element) {
  const kind = [element.localName, ...element.classList].join(".");
  const text = (element.textContent || element.getAttribute("src") || "").trim();
  return `${kind} "${text.replace(/\s+/g, " ").slice(0, 60)}"`;
}

function scrollsWithin(element, top) {
  for (let at = element; at && at !== top; at = at.parentElement) {
    if (/auto|scroll/.test(getComputedStyle(at).overflowX)) return true;
  }
  return false;
}

function checkWidths() {
  const page = document.documentElement;
  if (page.scrollWidth > innerWidth) {
    faults.push(`the page is ${page.scrollWidth} px wide in a window of ${innerWidth}`);
  }
  // The column with its margin, into which headings reach a little.
  const right = (article.closest(".content") || article).getBoundingClientRect().right;
  const outside = new Set();
  for (const element of article.querySelectorAll("*")) {
    if (!element.checkVisibility({ checkOpacity: true, visibilityProperty: true })) continue;
    const box = element.getBoundingClientRect();
    if (outside.has(element.parentElement)) outside.add(element);
    else if (box.width > 1 && box.right > right + 1 && !scrollsWithin(element, article)) {
      outside.add(element);
      faults.push(`${Math.round(box.right - right)} px too wide: ${name(element)}`);
    }
    const hidden = /hidden|clip/.test(getComputedStyle(element).overflowX);
    if (hidden && box.width > 1 && element.scrollWidth > element.clientWidth + 1) {
      faults.push(`cut at ${element.clientWidth} of ${element.scrollWidth} px: ${name(element)}`);
    }
    if (onDesk && element.localName === "pre" && element.scrollWidth > element.clientWidth) {
      const longest = element.textContent.split("\n").reduce((a, b) => (a.length < b.length ? b : a));
      faults.push(`a line of code of ${longest.length} characters does not fit: ${longest}`);
    }
  }
}

function parsed(color) {
  const [, kind, inside] = /^(rgba?|color)\((.*)\)$/.exec(color) || [];
  const numbers = (inside || "").replace("srgb", "").split(/[\s,/]+/).filter(Boolean).map(Number);
  if (numbers.length < 3 || numbers.some(Number.isNaN)) throw new Error(`cannot read ${color}`);
  const [red, green, blue, alpha = 1] = numbers;
  const most = kind === "color" ? 1 : 255;
  return [red / most, green / most, blue / most, alpha];
}

// Paints a colour over an opaque one.
function over([red, green, blue, alpha], below) {
  return [red, green, blue].map((part, at) => part * alpha + below[at] * (1 - alpha));
}

// The colour behind an element's text, and the opacity of that text.
const behind = new Map([[null, { ground: [1, 1, 1], opacity: 1 }]]);
function around(element) {
  if (!behind.has(element)) {
    const style = getComputedStyle(element);
    const { ground, opacity } = around(element.parentElement);
    behind.set(element, {
      ground: over(parsed(style.backgroundColor), ground),
      opacity: opacity * style.opacity,
    });
  }
  return behind.get(element);
}

function luminance(color) {
  const [red, green, blue] = color.map((part) =>
    part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4,
  );
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}

function contrast(one, other) {
  const [less, more] = [luminance(one), luminance(other)].sort((a, b) => a - b);
  return (more + 0.05) / (less + 0.05);
}

function isShown(text) {
  const range = document.createRange();
  range.selectNodeContents(text);
  return [...range.getClientRects()].some((box) => box.width > 1 && box.height > 1);
}

function checkContrasts() {
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const pairs = new Map(); // colours of text and ground -> where they were seen first
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !isShown(texts.currentNode)) continue;
    if (!element.checkVisibility({ checkOpacity: true, visibilityProperty: true })) continue;
    const { ground, opacity } = around(element);
    const [red, green, blue, alpha] = parsed(getComputedStyle(element).color);
    const ink = over([red, green, blue, alpha * opacity], ground);
    const key = `${ink} ${ground}`;
    if (!pairs.has(key)) pairs.set(key, [contrast(ink, ground), element]);
  }
  for (const [ratio, element] of pairs.values()) {
    if (ratio < LEAST_CONTRAST) faults.push(`contrast of ${ratio.toFixed(2)}: ${name(element)}`);
  }
}

// A picture's ground is to be the page's, and something in it is to stand out.
function checkPictures() {
  for (const picture of article.querySelectorAll("img")) {
    if (!picture.alt || picture.alt.startsWith("_images/")) {
      faults.push(`a picture that no words describe: ${name(picture)}`);
    }
    if (!picture.naturalWidth) {
      faults.push(`a picture that is not there: ${name(picture)}`);
      continue;
    }
    const canvas = document.createElement("canvas");
    canvas.width = 400;
    canvas.height = Math.ceil((400 * picture.naturalHeight) / picture.naturalWidth);
    const painter = canvas.getContext("2d", { willReadFrequently: true });
    const { ground } = around(picture);
    painter.fillStyle = `rgb(${ground.map((part) => part * 255)})`;
    painter.fillRect(0, 0, canvas.width, canvas.height);
    painter.filter = getComputedStyle(picture).filter;
    painter.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const { data } = painter.getImageData(0, 0, canvas.width, canvas.height);
    const counts = new Map();
    for (let at = 0; at < data.length; at += 4) {
      const color = data.slice(at, at + 3).join();
      counts.set(color, (counts.get(color) || 0) + 1);
    }
    const colors = [...counts]
      .sort((one, other) => other[1] - one[1])
      .map(([color]) => color.split(",").map((part) => part / 255));
    const apart = contrast(colors[0], ground);
    const most = Math.max(...colors.map((color) => contrast(color, colors[0])));
    if (apart > MOST_APART) faults.push(`a picture stands out by ${apart.toFixed(1)}: ${name(picture)}`);
    if (most < LEAST_CONTRAST) faults.push(`a picture of contrast ${most.toFixed(2)}: ${name(picture)}`);
  }
}

checkWidths();
checkContrasts();
if (onDesk) checkPictures(); // as they are on a phone
return faults;
