// The table of neurons. Of its thousands of rows only those in sight are in the document.

const COLUMNS = [
  { name: "neuron", title: "Neuron", value: (n) => n, first: 1 },
  { name: "layer", title: "Layer", value: (n) => layerOf(n).index, first: 1,
    shown: (n) => String(layerOf(n).index) },
  { name: "rate", title: "Firing rate", brief: "rate", value: (n) => table.firing_rate[n], first: -1,
    shown: (n) => percent(table.firing_rate[n]) },
  { name: "maximum", title: "Max", value: (n) => table.maximum[n], first: -1,
    shown: (n) => short(table.maximum[n]) },
  { name: "token", title: "Token entropy", brief: "token", value: (n) => table.token_entropy[n], first: 1,
    shown: (n) => fixed(table.token_entropy[n], 2) },
  { name: "less", title: "Minus shuffled", first: 1,
    value: (n) => table.token_entropy[n] - table.shuffled_token_entropy[n],
    shown: (n) => fixed(table.token_entropy[n] - table.shuffled_token_entropy[n], 2) },
  { name: "semantic", title: "Semantic entropy", brief: "semantic", value: (n) => table.semantic_entropy[n], first: 1,
    shown: (n) => fixed(table.semantic_entropy[n], 2) },
  { name: "mono", title: "MonoScore", brief: "mono", value: (n) => table.mono_score[n], first: -1,
    shown: (n) => fixed(table.mono_score[n], 3) },
  { name: "words", title: "Words" },
];
const SPARE_ROWS = 8; // above and below those in sight

const grid = {
  order: [], // numbers of the neurons, as sorted and filtered
  active: 0, // index in `order`
  sort: { name: "neuron", direction: 1 },
  texts: null, // what a search looks into, by number
};

function showNeurons() {
  document.title = `Neurons · ${meta.title}`;
  drawRows();
}

function fillTable() {
  byId("layer").append(
    element("option", { value: "" }, "all"),
    ...meta.layers.map((layer) =>
      element("option", { value: layer.index }, `${layer.index}${layer.isTopk ? "" : " (no TopK)"}`)),
  );
  byId("grid-head").append(...COLUMNS.map(headCell));
  byId("grid").setAttribute("aria-colcount", COLUMNS.length);
  byId("filters").addEventListener("input", chooseNeurons);
  byId("filters").addEventListener("submit", openTheOnly);
  byId("grid").addEventListener("scroll", drawRows, { passive: true });
  byId("grid").addEventListener("keydown", moveInTable);
  byId("grid-body").addEventListener("click", openRow);
  new ResizeObserver(drawRows).observe(byId("grid"));
  chooseNeurons();
}

function headCell(column) {
  const attributes = { class: `cell ${column.name}`, role: "columnheader" };
  if (!column.value) return element("div", attributes, column.title);
  const button = element("button", { type: "button" }, column.title);
  button.addEventListener("click", () => sortBy(column));
  return element("div", { ...attributes, "data-column": column.name }, button);
}

function sortBy(column) {
  const { name, direction } = grid.sort;
  grid.sort = { name: column.name, direction: name === column.name ? -direction : column.first };
  chooseNeurons();
}

function chooseNeurons() {
  const layer = byId("layer").value;
  const state = byId("state").value;
  const wanted = byId("search").value.trim().toLowerCase();
  const found = [];
  for (let n = 0; n < nNeurons; n++) {
    if (layer !== "" && layerOf(n).index !== Number(layer)) continue;
    if (state !== "all" && Boolean(table.dead[n]) !== (state === "dead")) continue;
    if (wanted && !matches(n, wanted)) continue;
    found.push(n);
  }
  grid.order = sorted(found);
  grid.active = 0;
  byId("grid").scrollTop = 0;
  byId("count").textContent = `${grouped(found.length)} of ${grouped(nNeurons)}`;
  for (const cell of byId("grid-head").children) {
    const isSorted = cell.dataset.column === grid.sort.name;
    if (isSorted) cell.setAttribute("aria-sort", grid.sort.direction > 0 ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
  }
  drawRows();
}

/** What has no value stands last either way; equal ones by number. */
function sorted(numbers) {
  const { value } = COLUMNS.find((column) => column.name === grid.sort.name);
  const values = new Map(numbers.map((n) => [n, value(n)]));
  const isMissing = (n) => Number.isNaN(values.get(n));
  return numbers.sort((a, b) =>
    isMissing(a) - isMissing(b) ||
    (isMissing(a) ? 0 : grid.sort.direction * (values.get(a) - values.get(b))) ||
    a - b);
}

function matches(number, wanted) {
  grid.texts ??= Array.from({ length: nNeurons }, (_, n) => searched(n));
  return nameOf(number) === wanted || grid.texts[number].includes(wanted);
}

function searched(number) {
  const tops = [...rowOf(table.tops, number)].filter((token) => token >= 0).map(spelled);
  return [...table.words[number], ...tops].join("\n").toLowerCase();
}

// Rows ------------------------------------------------------------------------------------

function rowHeight() {
  return parseFloat(getComputedStyle(byId("grid")).getPropertyValue("--row"));
}

function drawRows() {
  const [view, body, height] = [byId("grid"), byId("grid-body"), rowHeight()];
  const headHeight = byId("grid-head").offsetHeight;
  const first = Math.max(Math.floor(view.scrollTop / height) - SPARE_ROWS, 0);
  const inSight = Math.ceil((view.clientHeight - headHeight) / height) + 2 * SPARE_ROWS;
  const rows = grid.order.slice(first, first + inSight);
  body.style.setProperty("block-size", `${grid.order.length * height}px`);
  body.replaceChildren(...rows.map((number, i) => rowElement(number, first + i, height)));
  view.setAttribute("aria-rowcount", grid.order.length + 1);
  const active = body.querySelector(".active");
  if (active) view.setAttribute("aria-activedescendant", active.id);
  else view.removeAttribute("aria-activedescendant");
  if (!grid.order.length) body.append(element("p", { class: "hint" }, "No neuron matches."));
}

function rowElement(number, position, height) {
  const row = element("div", {
    class: "grid-row", role: "row", id: `row-${number}`, "data-number": number,
    "aria-rowindex": position + 2,
  });
  row.style.setProperty("inset-block-start", `${position * height}px`);
  row.classList.toggle("active", position === grid.active);
  row.classList.toggle("dead", Boolean(table.dead[number]));
  row.append(...COLUMNS.map((column) => rowCell(column, number)));
  return row;
}

function rowCell(column, number) {
  const cell = element("div", { class: `cell ${column.name}`, role: "gridcell" });
  if (column.name === "neuron") cell.append(neuronLink(number, { tabindex: "-1" }));
  else if (column.name === "words") cell.append(wordsOrTokens(number));
  else {
    cell.append(
      element("span", { class: "label", "aria-hidden": "true" }, column.brief ?? column.title),
      column.shown(number),
    );
  }
  return cell;
}

/** The words; top tokens where there are no words. */
function wordsOrTokens(number, most) {
  if (table.dead[number]) return element("span", { class: "quiet" }, "never fired");
  if (table.words[number].length) return wordList(table.words[number], most);
  const tops = [...rowOf(table.tops, number)].filter((token) => token >= 0);
  return element("span", { class: "words" }, ...tops.map(tokenChip));
}

// Keys and clicks -------------------------------------------------------------------------

function moveInTable(event) {
  if (event.target !== byId("grid")) return;
  const page = Math.max(Math.floor(byId("grid").clientHeight / rowHeight()) - 2, 1);
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
  if (event.key === "Enter" && grid.order.length) {
    location.hash = `#neuron/${nameOf(grid.order[grid.active])}`;
  } else if (event.key === "Home") moveTo(0);
  else if (event.key === "End") moveTo(grid.order.length - 1);
  else if (event.key in steps) moveTo(grid.active + steps[event.key]);
  else return;
  event.preventDefault();
}

function moveTo(position) {
  grid.active = Math.max(Math.min(position, grid.order.length - 1), 0);
  const [view, height] = [byId("grid"), rowHeight()];
  const top = grid.active * height;
  const room = view.clientHeight - byId("grid-head").offsetHeight;
  view.scrollTop = Math.min(Math.max(view.scrollTop, top + height - room), top);
  drawRows();
}

function openRow(event) {
  const row = event.target.closest(".grid-row");
  if (!row) return;
  grid.active = grid.order.indexOf(Number(row.dataset.number));
  // A link opens itself, and so does not take a new tab's place.
  if (!event.target.closest("a")) location.hash = `#neuron/${nameOf(Number(row.dataset.number))}`;
}

/** Enter in the search opens a neuron called by its name, or goes on to the table. */
function openTheOnly(event) {
  event.preventDefault();
  const wanted = byId("search").value.trim();
  if (numberOf(wanted) >= 0) location.hash = `#neuron/${wanted}`;
  else byId("grid").focus();
}

/** Back from a neuron: where one was. */
function focusTable(number) {
  const position = grid.order.indexOf(number);
  if (position >= 0) moveTo(position);
  byId("grid").focus({ preventScroll: true });
}
