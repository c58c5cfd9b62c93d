// Steering: what comes of raising a neuron, in numbers and in texts.

const WORDS_OF_CONCEPT = 6; // in the table
const WORDS_OF_OPTION = 3;
const LONGEST_PROMPT = 48; // characters, in the list of prompts
// What is chosen in turn; the last one is the example itself.
const CHOICES = ["concept", "method", "delta", "index"];
// As the analysis reads words: letters and their marks, with apostrophes between them.
const WORD = /\p{L}[\p{L}\p{M}]*(?:['’]\p{L}[\p{L}\p{M}]*)*/gu;
let steering = null; // the chunk of that name, once it is unpacked
let shownExample = 0;

async function readSteering() {
  const found = await chunk("steering");
  if (steering) return; // the part of the page is filled once
  steering = found;
  steering.examples.forEach((example, i) => (example.index = i));
  fillSteering();
}

/** The part of the page; `index` is that of an example, "" for the one that was shown. */
async function showSteering(index) {
  document.title = `Steering · ${meta.title}`;
  await readSteering();
  if (!index) return;
  if (steering.examples[Number(index)]) drawExample(Number(index));
  else byId("steering-example").replaceChildren(element("p", {}, `There is no example ${index}`));
}

function fillSteering() {
  const { sentences, methods, concepts, examples } = steering;
  for (const sentence of sentences) {
    byId("steering-sentences").append(showText(element("li"), sentence));
  }
  if (methods.rows.length) {
    byId("steering-methods").append(
      element("h2", {}, methods.title, showText(element("small", {}, " "), methods.note)),
      scrollingTable(methods));
  }
  if (concepts.length) {
    byId("steering-concepts").append(
      element("h2", {}, "Neurons", element("small", {}, " at the delta chosen for each")),
      conceptTable(concepts));
  }
  byId("steering-examples").hidden = !examples.length;
  if (!examples.length) return;
  byId("steering-choice").addEventListener("input", chooseExample);
  byId("steering-choice").addEventListener("submit", (event) => event.preventDefault());
  drawExample(exampleOf(examples[0].concept));
}

// Numbers ---------------------------------------------------------------------------------

function conceptTable(concepts) {
  const columns = ["Neuron", "Fires on", "Delta", "Rate unsteered", "Rate steered", "Lift",
    "Perplexity ratio", "Score", ""];
  const rows = concepts.map((concept, i) => {
    const { rate, unsteeredRate, lift, ratio, score } = concept.numbers ?? {};
    const index = exampleOf(i);
    return [
      conceptLink(concept), wordList(concept.words, WORDS_OF_CONCEPT), deltaOf(concept),
      percent(unsteeredRate), percent(rate), fixed(lift, 2), fixed(ratio, 2), fixed(score, 2),
      index < 0 ? "" : element("a", { href: `#steering/${index}` }, "example"),
    ];
  });
  return scrollingTable({ title: "Neurons that were steered", columns, rows });
}

function conceptLink({ name }) {
  return neuronLink(numberOf(name));
}

/** 2 × (38.8): the multiple, and what is added. */
function deltaOf({ delta, absolute }) {
  return delta == null ? NONE : `${short(delta)} × (${short(absolute)})`;
}

/** The example to begin with: of the neuron itself, at its chosen delta; -1 if there is none. */
function exampleOf(concept) {
  const own = steering.examples.filter((one) => one.concept === concept);
  const rank = ({ isChosen, method }) => 2 * (method === own[0].method) + isChosen;
  const best = own.sort((a, b) => rank(b) - rank(a) || a.index - b.index)[0];
  return best ? best.index : -1;
}

function numbersList(numbers) {
  if (!numbers) return null;
  const { rate, unsteeredRate, lift, ratio, score } = numbers;
  const items = [
    ["Concept rate", `${percent(unsteeredRate)} → ${percent(rate)}`],
    ["Lift", fixed(lift, 2)], ["Perplexity ratio", fixed(ratio, 2)], ["Score", fixed(score, 2)],
  ];
  return element("dl", { class: "scores", title: "Over all prompts on which delta was not chosen" },
    ...items.map(([name, value]) => element("div", {},
      element("dt", {}, name), element("dd", {}, value))));
}

// Texts -----------------------------------------------------------------------------------

function drawExample(index) {
  shownExample = index;
  fillChoices();
  const example = steering.examples[index];
  const concept = steering.concepts[example.concept];
  byId("steering-example").replaceChildren(...[
    element("p", { class: "about" }, conceptLink(concept), " fires on ",
      wordList(concept.words), "."),
    numbersList(example.numbers),
    pairOfTexts(example),
  ].filter(Boolean));
}

/** Unsteered and steered, the concept's words marked. */
function pairOfTexts(example) {
  const { words, heldOut } = steering.concepts[example.concept];
  const wanted = new Set([...words, ...heldOut].map(wordKey));
  const steered = showText(element("small", {}, " "), `${example.method}, ${deltaOf(example)}`);
  return element("div", { class: "pair" },
    oneText(element("h3", {}, "Unsteered"), example.prompt, example.unsteered, wanted),
    oneText(element("h3", {}, "Steered", steered), example.prompt, example.steered, wanted));
}

function oneText(title, prompt, text, wanted) {
  const passage = element("p", { class: "passage", dir: "auto" });
  const found = wordsOf(prompt, text);
  const marked = found.filter(({ word }) => wanted.has(word));
  passage.append(showLines(element("span", { class: "prompt", title: "prompt" }), prompt));
  let end = 0;
  for (const { from, to } of marked) {
    showLines(passage, text.slice(end, from));
    passage.append(showText(element("mark", { class: "concept" }), text.slice(from, to)));
    end = to;
  }
  showLines(passage, text.slice(end));
  return element("section", { class: "card" }, title, passage,
    element("p", { class: "hint" }, `${marked.length} of ${found.length} words are the neuron's`));
}

/** The words of a text and where they stand in it; the prompt may have begun the first. */
function wordsOf(prompt, text) {
  const first = prompt.length;
  return [...(prompt + text).matchAll(WORD)]
    .map((found) => ({ word: wordKey(found[0]), from: Math.max(found.index - first, 0),
      to: found.index + found[0].length - first }))
    .filter(({ to }) => to > 0);
}

function wordKey(word) {
  return word.toLowerCase().replaceAll("’", "'");
}

/** Text with a line break behind each newline, which is shown too. */
function showLines(parent, text) {
  text.split("\n").forEach((line, i, lines) => {
    showText(parent, i < lines.length - 1 ? `${line}\n` : line);
    if (i < lines.length - 1) parent.append(element("br"));
  });
  return parent;
}

// The choice ------------------------------------------------------------------------------

/** Each list holds what there is under what is chosen before it. */
function fillChoices() {
  const chosen = steering.examples[shownExample];
  let left = steering.examples;
  for (const name of CHOICES) {
    const firsts = left.filter((one, i) => left.findIndex((two) => two[name] === one[name]) === i);
    const select = choiceOf(name);
    select.replaceChildren(...firsts.map((one) =>
      element("option", { value: String(one[name]) }, choiceLabel(name, one))));
    select.value = String(chosen[name]);
    select.disabled = firsts.length < 2;
    left = left.filter((one) => one[name] === chosen[name]);
  }
}

function choiceOf(name) {
  return byId("steering-choice").querySelector(`[data-choice=${name}]`);
}

function choiceLabel(name, example) {
  if (name === "concept") {
    const { name: neuron, words } = steering.concepts[example.concept];
    return visible(`${neuron} ${words.slice(0, WORDS_OF_OPTION).join(", ")}`);
  }
  if (name === "delta") return `${deltaOf(example)}${example.isChosen ? " chosen" : ""}`;
  if (name === "method") return visible(example.method);
  const characters = [...example.prompt];
  const end = characters.length > LONGEST_PROMPT ? "…" : "";
  return visible(characters.slice(0, LONGEST_PROMPT).join("") + end);
}

/** What stands before the list that was changed stays, and what stands after it where it can. */
function chooseExample(event) {
  const changed = CHOICES.indexOf(event.target.dataset.choice);
  const before = steering.examples[shownExample];
  let left = steering.examples;
  CHOICES.forEach((name, i) => {
    const found = left.filter((one) =>
      i > changed ? isAlike(name, one, before) : String(one[name]) === choiceOf(name).value);
    if (found.length) left = found;
  });
  history.replaceState(null, "", `#steering/${left[0].index}`);
  drawExample(left[0].index);
}

/** Each neuron and method has a delta of its own that was chosen, and examples of its own. */
function isAlike(name, one, before) {
  if (name === "index") return one.prompt === before.prompt;
  if (name === "delta" && before.isChosen) return one.isChosen;
  return one[name] === before[name];
}

// With a neuron ---------------------------------------------------------------------------

/** What steering a neuron did; null if it was not steered. */
async function steeredPart(name) {
  if (!meta.isSteered) return null;
  await readSteering();
  const i = steering.concepts.findIndex((concept) => concept.name === name);
  if (i < 0) return null;
  const concept = steering.concepts[i];
  const index = exampleOf(i);
  return element("section", { class: "steered-part" },
    element("h2", {}, "Steered", element("small", {}, ` by ${deltaOf(concept)}`)),
    numbersList(concept.numbers),
    index < 0 ? null : pairOfTexts(steering.examples[index]),
    element("p", {}, element("a", { href: `#steering${index < 0 ? "" : `/${index}`}` },
      "Steering, with all examples")));
}
