// Tokens: what they spell, and how a value colours them.

/** The characters of a token; "" for special ones and for parts of characters. */
function spelled(token) {
  const piece = table.pieces[token];
  return typeof piece === "string" ? piece : "";
}

/** Append a token: its text, ⟨c3⟩ for bytes that are no characters, ⟨eos⟩ for special ones. */
function showToken(parent, token, options) {
  const piece = table.pieces[token];
  if (typeof piece === "string") return showText(parent, piece, options);
  parent.append(element("span", { class: "sign" }, `⟨${piece.hex ?? piece.name}⟩`));
  return parent;
}

function tokenTitle(token) {
  const piece = table.pieces[token];
  return typeof piece === "string" ? visible(piece) : `⟨${piece.hex ?? piece.name}⟩`;
}

/** A token in quotation marks of its own, spaces shown: for lists. */
function tokenChip(token) {
  return showToken(element("bdi", { class: "chip" }), token, { spaces: true });
}

const LEAST_STRENGTH = 0.06; // what fired is seen

/** Colour an element: strength is the value relative to the largest, -1 to 1. */
function colour(target, strength) {
  const size = strength === 0 ? 0 : Math.max(Math.min(Math.abs(strength), 1), LEAST_STRENGTH);
  target.classList.toggle("negative", strength < 0);
  target.style.setProperty("--strength", size.toFixed(3));
}

/** A token of a text: marked and with its value where the neuron fires. */
function colouredToken(token, value, largest) {
  if (value === 0) return showToken(element("span", { class: "token" }), token);
  const text = `${short(value)} on ${tokenTitle(token)}`;
  const mark = element("mark", { class: "token", title: text, "data-value": value });
  colour(mark, value / largest);
  return showToken(mark, token);
}

/** A passage of tokens; a line break follows each newline that is shown. */
function passage(parent, tokens) {
  for (const [token, made] of tokens) {
    parent.append(made);
    if (spelled(token).includes("\n")) parent.append(element("br"));
  }
  return parent;
}
