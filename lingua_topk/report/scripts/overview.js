// The first page: the run, what was found, where to begin.

const STARTS = 5; // neurons a list

function showOverview() {
  document.title = meta.title;
}

function fillOverview() {
  for (const [name, value] of meta.facts) {
    byId("facts").append(element("dt", {}, name), showText(element("dd"), value));
  }
  for (const sentence of meta.sentences) {
    byId("sentences").append(showText(element("li"), sentence));
  }
  if (!meta.sentences.length) byId("sentences").append(element("li", {}, "No comparison was made."));
  byId("figures").hidden = !document.querySelector(".figures figure");
  byId("comparison").hidden = !meta.tables.length;
  byId("tables").append(...meta.tables.map(comparisonTable));
  byId("marks").append(
    "Characters that would not be seen are written out in grey: ",
    showText(element("bdi"), "\n \t \u202e"),
    " for a new line, a tab and a turn of direction; ⟨c3⟩ is a byte that is a part of a character.",
  );
  for (const mark of document.querySelectorAll("[data-strength]")) {
    colour(mark, mark.classList.contains("negative") ? -1 : 1);
  }
}

function comparisonTable(table) {
  return element("details", { class: "comparison", open: table.rows.length < 16 },
    showText(element("summary"), table.title), scrollingTable(table),
    table.note ? showText(element("p", { class: "hint" }), table.note) : null);
}

/** Lists of neurons to look at first, once the table is there. */
function fillStarts() {
  const isTopk = meta.layers.flatMap((layer) => Array(layer.width).fill(layer.isTopk));
  const some = isTopk.includes(true);
  const chosen = [...isTopk.keys()].filter((n) => !table.dead[n] && (isTopk[n] || !some));
  const less = (n) => table.token_entropy[n] - table.shuffled_token_entropy[n];
  // Of neurons that fire on spaces, signs or pieces the few words say little.
  const told = (values) => (n) => (table.told[n] ? values(n) : NaN);
  const lists = [
    ["Lowest semantic entropy", told((n) => table.semantic_entropy[n]), (v) => `${fixed(v, 2)} bits`],
    ["Highest MonoScore", told((n) => -table.mono_score[n]), (v) => fixed(-v, 3)],
    ["Token entropy farthest below shuffled", less, (v) => `${fixed(v, 2)} bits`],
  ];
  byId("starts").append(...lists.map((list) => startList(chosen, ...list)).filter(Boolean));
}

function startList(chosen, title, value, written) {
  const scored = chosen.filter((n) => !Number.isNaN(value(n)));
  const best = scored.sort((a, b) => value(a) - value(b)).slice(0, STARTS);
  if (!best.length) return null;
  const lines = best.map((n) =>
    element("li", {}, neuronLink(n), element("span", { class: "number" }, written(value(n))),
      wordsOrTokens(n, 5)));
  return element("div", {}, element("h3", {}, title), element("ol", { class: "starts" }, ...lines));
}
