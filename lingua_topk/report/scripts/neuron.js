// The page of one neuron.

async function showNeuron(name) {
  const number = numberOf(name);
  const view = byId("view-neuron");
  if (number < 0) {
    view.replaceChildren(heading(`There is no neuron ${name}`), backLink());
    return;
  }
  const [neuron, steered] = [await neuronData(number), await steeredPart(name)];
  document.title = `Neuron ${name} · ${meta.title}`;
  view.replaceChildren(
    neuronHead(neuron),
    ...(neuron.count ? neuronBody(neuron, steered)
      : [deadNote(), steered, sameIndex(neuron), trace(neuron)]).filter(Boolean),
  );
}

function heading(text) {
  return element("h1", { tabindex: "-1" }, text);
}

function backLink() {
  return element("a", { href: "#neurons", class: "back" }, "← all neurons");
}

function neuronHead({ layer, number, count, firing_rate }) {
  const kind = layer.isTopk ? "TopK" : `no TopK; recorded: ${layer.kept}`;
  const often = `fires on ${percent(firing_rate)} of the tokens: ${grouped(count)} of`;
  return element("div", { class: "neuron-head" },
    element("p", { class: "path" }, backLink(), " ", besides(number)),
    heading(`Neuron ${nameOf(number)}`),
    element("p", { class: "lead" }, `Layer ${layer.index} (${kind}); `,
      count ? `${often} ${grouped(meta.tokens)}.` : "never fires."));
}

/** Links to the neurons before and after it. */
function besides(number) {
  const links = element("span", { class: "besides" });
  const ends = [[-1, "← ", ""], [1, "", " →"]];
  for (const [step, before, after] of ends) {
    const other = number + step;
    if (other < 0 || other >= nNeurons) continue;
    const name = nameOf(other);
    links.append(element("a", { href: `#neuron/${name}` }, `${before}${name}${after}`), " ");
  }
  return links;
}

function deadNote() {
  return element("p", {}, "This neuron was 0 on every recorded token: there is nothing to measure.");
}

function neuronBody(neuron, steered) {
  return [
    contexts(neuron),
    steered,
    element("div", { class: "cards" }, ...[
      measures(neuron),
      topTokens(neuron),
      topWords(neuron),
      valuesCard(neuron),
      logits(neuron, "promoted", "Promotes", "next tokens, direct path"),
      logits(neuron, "suppressed", "Suppresses", "next tokens, direct path"),
      sameIndex(neuron),
      trace(neuron),
    ].filter(Boolean)),
  ];
}

function card(title, about, ...children) {
  return element("section", { class: "card" },
    element("h2", {}, title, about ? element("small", {}, ` ${about}`) : null), ...children);
}

// Contexts --------------------------------------------------------------------------------

function contexts(neuron) {
  if (!neuron.context_tokens) return null;
  const list = element("ol", { class: "contexts" });
  for (let c = 0; c < neuron.context_rows.length; c++) {
    if (neuron.context_rows[c] >= 0) list.append(context(neuron, c));
  }
  list.addEventListener("click", readValue);
  return element("section", { class: "contexts-part" },
    element("h2", {}, "Contexts", element("small", {}, " of its largest values")),
    list, element("p", { class: "hint readout", "aria-live": "polite" }));
}

function context(neuron, c) {
  const begin = c * neuron.window;
  const tokens = neuron.context_tokens.subarray(begin, begin + neuron.window);
  const values = neuron.context_values.subarray(begin, begin + neuron.window);
  const made = [...tokens].flatMap((token, i) => {
    if (token >= table.pieces.length) return []; // beyond the end of the row
    const one = colouredToken(token, (values[i] / 127) * neuron.maximum, neuron.maximum);
    one.classList.toggle("peak", i === neuron.context_peaks[c]);
    return [[token, one]];
  });
  const peak = (values[neuron.context_peaks[c]] / 127) * neuron.maximum;
  return element("li", {},
    element("span", { class: "where" }, element("b", {}, short(peak)), " ", whereLink(neuron, c)),
    passage(element("p", { class: "passage", dir: "auto" }), made));
}

/** Row and position; a link where the report holds that text. */
function whereLink(neuron, c) {
  const [row, position] = [neuron.context_rows[c], neuron.context_starts[c] + neuron.context_peaks[c]];
  const text = meta.texts.findIndex((one) => one.row === row);
  const label = `row ${row}, token ${position}`;
  return text < 0 ? label : element("a", { href: `#text/${text}:${position}` }, label);
}

/** Where there is no pointer to rest on a token, a tap says its value. */
function readValue(event) {
  const mark = event.target.closest("mark");
  if (mark) byId("view-neuron").querySelector(".readout").textContent = mark.title;
}

// Cards -----------------------------------------------------------------------------------

function measures(neuron) {
  const head = ["", "neuron", "shuffled"].map((name) => element("th", { scope: "col" }, name));
  const rows = [
    ["Token entropy (bits)", neuron.token_entropy, neuron.shuffled_token_entropy, 2],
    ["by count", neuron.token_entropy_count, neuron.shuffled_token_entropy_count, 2],
    ["of the highest possible", neuron.token_entropy_normalised, NaN, 3],
    ["Semantic entropy (bits)", neuron.semantic_entropy, neuron.shuffled_semantic_entropy, 2],
    ["MonoScore", neuron.mono_score, neuron.shuffled_mono_score, 3],
  ].map(([name, value, control, digits]) => element("tr", {},
    element("th", { scope: "row" }, name),
    element("td", {}, fixed(value, digits)), element("td", { class: "quiet" }, fixed(control, digits))));
  return card("Measures", null,
    element("table", { class: "measures" },
      element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...rows)),
    element("p", { class: "hint" }, wordsNote(neuron)));
}

function wordsNote({ n_words, n_with_vector, coverage, semantic_entropy }) {
  if (Number.isNaN(n_words)) return "";
  const scored = Number.isNaN(semantic_entropy) ? " Too few for a semantic entropy." : "";
  return `Strong on ${n_words} words, ${n_with_vector} of them with a vector` +
    ` (${percent(coverage)} of the activation).${scored}`;
}

function topTokens(neuron) {
  const items = [...(neuron.top_tokens ?? [])].flatMap((token, i) => {
    if (token < 0) return [];
    const share = neuron.top_token_share[i];
    return [listed(tokenChip(token), percent(share), share / neuron.top_token_share[0])];
  });
  return items.length
    ? card("Top tokens", "by share of its activation", element("ol", { class: "ranked" }, ...items))
    : null;
}

function topWords(neuron) {
  if (!neuron.words.length) return null;
  const most = Math.abs(neuron.words[0][1]) || 1;
  const items = neuron.words.map(([word, value]) => listed(bdi(word), short(value), value / most));
  return card("Words", "by largest value", element("ol", { class: "ranked" }, ...items));
}

function logits(neuron, name, title, about) {
  const tokens = neuron[name];
  if (!tokens) return null;
  const values = neuron[`${name}_logits`];
  const most = Math.max(...[...values].map(Math.abs)) || 1;
  const items = [...tokens].flatMap((token, i) =>
    token < 0 ? [] : [listed(tokenChip(token), short(values[i]), values[i] / most)]);
  return card(title, about, element("ol", { class: "ranked" }, ...items));
}

function listed(what, number, share) {
  return element("li", {}, what, bar(share, share < 0), element("span", { class: "number" }, number));
}

function valuesCard(neuron) {
  if (!neuron.histogram) return null;
  return card("Values", "|value| where it fires", histogram([...neuron.histogram], neuron.maximum),
    element("p", { class: "hint" },
      `Mean ${short(neuron.mean)}, largest ${short(neuron.maximum)}. Heights by square root.`));
}

/** Neurons with the same index in the other layers, with what they share if it was traced. */
function sameIndex(neuron) {
  const others = meta.layers.filter((one) => one !== neuron.layer && neuron.index < one.width);
  if (!others.length) return null;
  const items = others.map((layer) => {
    const number = layer.first + neuron.index;
    const shared = sharedWith(neuron, layer.index);
    return element("li", {}, neuronLink(number), wordsOrTokens(number),
      shared ? element("span", { class: "hint" }, shared) : null);
  });
  return card("The same index", "in other layers", element("ol", { class: "same" }, ...items));
}

function sharedWith(neuron, other) {
  if (!neuron.shared_overlap) return "";
  const pair = meta.trace.pairs.findIndex((two) => two.includes(other) && two.includes(neuron.layer.index));
  if (pair < 0 || Number.isNaN(neuron.shared_overlap[pair])) return "";
  const usual = meta.trace.baselines.shifted_overlap?.[pair];
  return `overlap of tokens ${fixed(neuron.shared_overlap[pair], 2)}` +
    (usual == null ? "" : ` (another index: median ${fixed(usual, 2)})`);
}

// Trace -----------------------------------------------------------------------------------

function trace(neuron) {
  if (!neuron.trace_overlap) return null;
  const { steps, annealedAt } = meta.trace;
  const drawnOf = (name, values, high) => element("figure", { class: "small" },
    element("figcaption", {}, name),
    sparkline(steps, values, { high, label: `${name} over training steps`, mark: annealedAt }));
  const settled = neuron.settled < 0 ? "It is dead in the end." : `Settled from step ${grouped(neuron.settled)} on.`;
  const annealed = annealedAt == null ? "" : " Dashed: annealing ends.";
  return card("Trace", "over training steps",
    element("p", {}, settled, annealed),
    drawnOf("Overlap with its final self", neuron.trace_overlap, 1),
    drawnOf("Token entropy (bits)", neuron.trace_token_entropy),
    drawnOf("Semantic entropy (bits)", neuron.trace_semantic_entropy),
    traceTokens(neuron));
}

function traceTokens(neuron) {
  if (!neuron.trace_tops) return null;
  const width = neuron.trace_tops.length / meta.trace.steps.length;
  const rows = meta.trace.steps.map((step, i) => {
    const tops = [...neuron.trace_tops.subarray(i * width, (i + 1) * width)];
    return element("li", {}, element("span", { class: "number" }, grouped(step)),
      element("span", { class: "words" }, ...tops.filter((token) => token >= 0).map(tokenChip)));
  });
  return element("details", {}, element("summary", {}, "Top tokens at each step"),
    element("ol", { class: "steps" }, ...rows));
}
