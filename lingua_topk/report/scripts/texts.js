// Texts: which neurons fire on each token.

const SNIPPET = 90; // characters
const reading = { index: -1, position: 0, layer: "", coloured: -1, data: null, tokens: null };
const library = { texts: null }; // by text: ids, what they spell, where each token begins

async function readLibrary() {
  if (library.texts) return;
  const { tokens } = await chunk("texts");
  let begin = 0;
  library.texts = meta.texts.map(({ length }) => {
    const ids = tokens.slice(begin, begin + length);
    begin += length;
    return { ids, text: [...ids].map(spelled).join("") };
  });
}

// The list --------------------------------------------------------------------------------

async function showTexts() {
  document.title = `Texts · ${meta.title}`;
  if (!meta.texts.length) {
    byId("text-list").replaceChildren(element("li", {}, "This report holds no texts."));
    return;
  }
  await readLibrary();
  listTexts();
}

function listTexts() {
  const words = byId("words").value.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const found = meta.texts.flatMap((text, i) => {
    const lower = library.texts[i].text.toLowerCase();
    return words.every((word) => lower.includes(word)) ? [textItem(text, i, words[0], lower)] : [];
  });
  byId("text-count").textContent = `${found.length} of ${meta.texts.length}`;
  byId("text-list").replaceChildren(...found);
  if (!found.length) byId("text-list").append(element("li", {}, "No text here holds all of these words."));
}

function textItem({ name, length }, i, word, lower) {
  const { text } = library.texts[i];
  const at = word ? lower.indexOf(word) : 0;
  const from = Math.max(at - SNIPPET / 3, 0);
  const target = word ? `#text/${i}:${tokenAt(i, at)}` : `#text/${i}`;
  const snippet = element("span", { class: "snippet", dir: "auto" });
  if (from) snippet.append("… ");
  showText(snippet, text.slice(from, at));
  if (word) snippet.append(showText(element("b"), text.slice(at, at + word.length)));
  showText(snippet, `${text.slice(at + (word?.length ?? 0), from + SNIPPET * 2)} …`);
  return element("li", {}, element("a", { href: target },
    element("span", { class: "text-name" }, showText(element("span"), name), ` · ${grouped(length)} tokens`),
    snippet));
}

/** The token of a text that holds its character at an index. */
function tokenAt(i, character) {
  let end = 0;
  const { ids } = library.texts[i];
  const found = ids.findIndex((token) => (end += spelled(token).length) > character);
  return Math.max(found, 0);
}

// One text --------------------------------------------------------------------------------

async function showTextPage(place) {
  const found = /^(\d+)(?::(\d+))?$/.exec(place);
  const [index, position] = found ? [Number(found[1]), Number(found[2] ?? 0)] : [-1, 0];
  if (!meta.texts[index]) {
    byId("view-text").replaceChildren(heading(`There is no text ${place}`), textsLink());
    return;
  }
  await readLibrary();
  if (reading.index !== index) {
    Object.assign(reading, { index, coloured: -1, data: await chunk(`text-${index}`) });
    drawText();
  }
  document.title = `${visible(meta.texts[index].name)} · ${meta.title}`;
  const last = library.texts[index].ids.length - 1;
  choose(Math.min(position, last));
}

function textsLink() {
  return element("p", { class: "path" }, element("a", { href: "#texts", class: "back" }, "← all texts"));
}

function drawText() {
  const { ids } = library.texts[reading.index];
  const made = [...ids].map((token, i) => [token, showToken(
    element("span", { class: "token choice", role: "option", tabindex: "-1", "data-position": i,
      "aria-label": `${i}: ${tokenTitle(token)}` }), token)]);
  reading.tokens = made.map(([, one]) => one);
  const text = passage(element("div", {
    class: "passage reading", dir: "auto", role: "listbox", "aria-label": "Tokens of the text",
    "aria-orientation": "horizontal",
  }), made);
  text.addEventListener("click", (event) => {
    const token = event.target.closest(".choice");
    if (token) goTo(Number(token.dataset.position), true);
  });
  text.addEventListener("keydown", moveInText);
  byId("view-text").replaceChildren(
    textsLink(),
    showText(heading(""), meta.texts[reading.index].name),
    element("p", { class: "hint" },
      `Click a token, or move with the arrow keys. Of each token and layer the ${meta.strongest}` +
      " strongest neurons are kept in this file."),
    element("div", { class: "text-page" },
      element("div", {}, element("p", { class: "hint coloured-by", "aria-live": "polite" }), text),
      element("aside", { class: "firings", "aria-label": "Neurons on the chosen token" },
        firingsHead(), element("div", { class: "firings-list", id: "firings" }))));
}

function firingsHead() {
  const layers = meta.layers.filter(({ index }) => reading.data[`${index}-offsets`]);
  const select = element("select", { id: "text-layer" },
    element("option", { value: "" }, "all layers"),
    ...layers.map(({ index }) => element("option", { value: index }, `layer ${index}`)));
  select.value = reading.layer;
  select.addEventListener("input", () => {
    reading.layer = select.value;
    listFirings();
  });
  return element("div", { class: "firings-head" },
    element("h2", { id: "chosen" }), element("label", {}, element("span", { class: "unseen" }, "Layer"), select));
}

function moveInText(event) {
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: lineStep(1), ArrowUp: lineStep(-1),
    Home: -reading.position, End: reading.tokens.length - 1 - reading.position };
  if (!(event.key in steps)) return;
  event.preventDefault();
  goTo(reading.position + steps[event.key], true);
}

/** How many tokens on stands the one below (or above) the chosen one. */
function lineStep(direction) {
  const here = reading.tokens[reading.position].getBoundingClientRect();
  let best = 0;
  for (let i = reading.position + direction; reading.tokens[i]; i += direction) {
    const there = reading.tokens[i].getBoundingClientRect();
    const lines = (direction * (there.top - here.top)) / here.height;
    if (lines < 0.5) continue;
    if (lines > 2.5 && best) break;
    best = i - reading.position;
    if (direction > 0 ? there.right >= here.left : there.left <= here.right) break;
  }
  return best;
}

/** Choose a token, and let the address say so without a step in the history. */
function goTo(position, focus) {
  const inside = Math.max(Math.min(position, reading.tokens.length - 1), 0);
  history.replaceState(null, "", `#text/${reading.index}:${inside}`);
  choose(inside);
  if (focus) reading.tokens[inside].focus();
}

function choose(position) {
  const before = reading.tokens[reading.position];
  before?.removeAttribute("aria-selected");
  before?.setAttribute("tabindex", "-1");
  reading.position = position;
  reading.tokens[position].setAttribute("aria-selected", "true");
  reading.tokens[position].setAttribute("tabindex", "0");
  listFirings();
}

function listFirings() {
  const token = library.texts[reading.index].ids[reading.position];
  byId("chosen").replaceChildren(tokenChip(token), element("small", {}, ` token ${reading.position}`));
  const layers = meta.layers.filter(({ index }) => reading.layer === "" || index === Number(reading.layer));
  byId("firings").replaceChildren(...layers.map(firingsOfLayer).filter(Boolean));
}

/** Number and value of the neurons of a layer at a position, strongest first. */
function firingsAt(layer, position) {
  const { index, first } = layer;
  const offsets = reading.data[`${index}-offsets`];
  if (!offsets) return [];
  const found = [];
  for (let i = offsets[position]; i < offsets[position + 1]; i++) {
    const value = (reading.data[`${index}-values`][i] / 32767) * reading.data.scales[index];
    found.push([first + reading.data[`${index}-neurons`][i], value]);
  }
  return found;
}

function firingsOfLayer(layer) {
  if (!reading.data[`${layer.index}-offsets`]) return null;
  const found = firingsAt(layer, reading.position);
  const most = Math.abs(found[0]?.[1] ?? 1);
  const items = found.map(([number, value]) => firing(number, value, value / most));
  const shown = items.length ? element("ol", { class: "fired" }, ...items)
    : element("p", { class: "hint" }, "no neuron fires");
  return element("section", {},
    element("h3", {}, `Layer ${layer.index}`, layer.isTopk ? null : element("small", {}, " no TopK")), shown);
}

function firing(number, value, share) {
  const button = element("button", {
    type: "button", class: "quiet paint", "aria-pressed": String(number === reading.coloured),
    title: `Colour the text by ${nameOf(number)}`, "aria-label": `Colour the text by ${nameOf(number)}`,
  }, "◐");
  button.addEventListener("click", () => paint(number, button));
  return element("li", {}, neuronLink(number), bar(share, value < 0),
    element("span", { class: "number" }, short(value)), wordList(table.words[number], 4), button);
}

/** Colour every token by what one neuron does there; once more takes the colours off. */
function paint(number, button) {
  reading.coloured = number === reading.coloured ? -1 : number;
  for (const other of byId("firings").querySelectorAll(".paint")) other.setAttribute("aria-pressed", "false");
  button.setAttribute("aria-pressed", String(reading.coloured >= 0));
  const layer = layerOf(number);
  const isOn = reading.coloured >= 0;
  const values = reading.tokens.map((_, i) =>
    isOn ? (firingsAt(layer, i).find(([other]) => other === number)?.[1] ?? 0) : 0);
  const largest = Math.max(...values.map(Math.abs), table.maximum[number] || 0) || 1;
  reading.tokens.forEach((token, i) => {
    colour(token, values[i] / largest);
    if (values[i]) token.title = short(values[i]);
    else token.removeAttribute("title");
  });
  const about = document.querySelector(".coloured-by");
  about.replaceChildren(...(isOn
    ? ["Coloured by ", neuronLink(number), `, where it is among the ${meta.strongest} strongest.`] : []));
}
