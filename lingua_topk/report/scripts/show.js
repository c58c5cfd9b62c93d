// Elements, numbers and text. Whatever comes from a corpus goes through `showText`.

/** An element with attributes and children; strings become text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child != null));
  return made;
}

function byId(id) {
  return document.getElementById(id);
}

const NONE = "–";
const MINUS = "−";

function fixed(value, digits) {
  if (value == null || Number.isNaN(value)) return NONE;
  return value.toFixed(digits).replace("-", MINUS);
}

function short(value) {
  if (value == null || Number.isNaN(value)) return NONE;
  const text = Math.abs(value) >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(3)));
  return text.replace("-", MINUS);
}

function percent(share) {
  if (share == null || Number.isNaN(share)) return NONE;
  return `${share < 0.01 ? Number((100 * share).toPrecision(2)) : short(100 * share)}%`;
}

function grouped(number) {
  return number.toLocaleString("en");
}

// Characters that would be invisible or turn the direction of writing: controls, format
// characters, separators other than the space, lone surrogates.
const HIDDEN = /[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\p{Co}]|(?! )\p{Zs}|\uFFFD/gu;
const SIGNS = { "\n": "⏎", "\r": "␍", "\t": "⇥", "\0": "␀", "\u00a0": "⍽" };

function signOf(character) {
  const code = character.codePointAt(0);
  return SIGNS[character] ?? `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
}

/** Append text with a quiet mark for each character that would not be seen. */
function showText(parent, text, { spaces = false } = {}) {
  const pattern = spaces ? new RegExp(`${HIDDEN.source}| `, "gu") : HIDDEN;
  let end = 0;
  for (const found of text.matchAll(pattern)) {
    parent.append(text.slice(end, found.index));
    const sign = found[0] === " " ? "␣" : signOf(found[0]);
    parent.append(element("span", { class: "sign" }, sign));
    end = found.index + found[0].length;
  }
  parent.append(text.slice(end));
  return parent;
}

/** The same as a string, for titles and labels. */
function visible(text) {
  return text.replace(HIDDEN, signOf);
}

function bdi(text) {
  return showText(element("bdi"), text);
}

/** Words with commas, cut to a few. */
function wordList(words, most = words.length) {
  const list = element("span", { class: "words" });
  words.slice(0, most).forEach((word, i) => list.append(i ? ", " : "", bdi(word)));
  return list;
}

function neuronLink(number, attributes = {}) {
  const name = nameOf(number);
  return element("a", { href: `#neuron/${name}`, class: "neuron-link", ...attributes }, name);
}

/** A table that is scrolled where it is too wide; cells are texts or elements. */
function scrollingTable({ title, columns, rows }) {
  const cell = (tag, what, attributes = {}) =>
    typeof what === "string" ? showText(element(tag, attributes), what) : element(tag, attributes, what);
  const head = columns.map((name) => cell("th", name, { scope: "col" }));
  const body = rows.map((row) => element("tr", {},
    ...row.map((what, i) => (i ? cell("td", what) : cell("th", what, { scope: "row" })))));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": visible(title) },
    element("table", {},
      element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body)));
}
