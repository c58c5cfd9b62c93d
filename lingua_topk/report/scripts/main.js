// Which part is shown: the hash of the address says so, and the history remembers.

const VIEWS = { overview: showOverview, neurons: showNeurons, neuron: showNeuron, texts: showTexts,
  text: showTextPage, ...(meta.isSteered && { steering: showSteering }) };
const PARENTS = { neuron: "neurons", text: "texts" };
let current = { view: "", what: "" };

function route() {
  const [view, what] = decodeURIComponent(location.hash.slice(1)).split("/");
  return { view: view in VIEWS ? view : "overview", what: what ?? "" };
}

async function go() {
  if (location.hash === "#main") return byId("main").focus();
  const [before, next] = [current, route()];
  current = next;
  try {
    table ??= await start();
    await VIEWS[next.view](next.what);
  } catch (error) {
    return complain(error);
  }
  // Another may have been asked for in the meantime.
  if (current !== next) return;
  for (const name of Object.keys(VIEWS)) byId(`view-${name}`).hidden = name !== next.view;
  for (const link of document.querySelectorAll("header nav a")) {
    const isHere = link.hash === `#${PARENTS[next.view] ?? next.view}`;
    if (isHere) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  arrive(before, next);
}

/** Scroll and focus as on a page of its own; coming back, where one was. */
function arrive(before, next) {
  if (before.view === next.view && next.view === "text") return;
  if (next.view === "neurons") {
    drawRows(); // it has its size only now
    if (before.view === "neuron") return focusTable(numberOf(before.what));
  }
  if (!before.view && !location.hash) return;
  window.scrollTo(0, 0);
  if (next.view === "steering" && next.what) return byId("steering-texts").focus();
  const title = byId(`view-${next.view}`).querySelector("h1");
  title.focus({ preventScroll: true });
  if (next.view === "text") reading.tokens?.[reading.position]?.scrollIntoView({ block: "center" });
}

async function start() {
  fillOverview();
  table = await chunk("table");
  fillStarts();
  fillTable();
  return table;
}

function complain(error) {
  console.error(error);
  byId("problem").textContent = error.message;
  byId("problem").hidden = false;
  if (byId("view-overview").hidden) byId("view-overview").hidden = false;
}

function leave(event) {
  if (event.key !== "Escape" || event.defaultPrevented || !(current.view in PARENTS)) return;
  if (event.target.closest?.("select, input")) return;
  location.hash = `#${PARENTS[current.view]}`;
}

// Light and dark --------------------------------------------------------------------------

const THEMES = ["auto", "light", "dark"];
const STORED = "lingua_topk report theme";
const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  const button = byId("theme");
  const preferred = prefersDark.matches ? "dark" : "light";
  document.documentElement.setAttribute("data-theme", theme === "auto" ? preferred : theme);
  button.textContent = { auto: "◐ auto", light: "○ light", dark: "● dark" }[theme];
  button.setAttribute("aria-label", `Colours: ${theme}; press to change`);
  button.dataset.theme = theme;
}

/** What was chosen before; a page opened from a file may not be allowed to remember. */
function storedTheme() {
  try {
    return THEMES.find((theme) => theme === localStorage.getItem(STORED)) ?? "auto";
  } catch {
    return "auto";
  }
}

function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(byId("theme").dataset.theme) + 1) % THEMES.length];
  setTheme(theme);
  try {
    localStorage.setItem(STORED, theme);
  } catch {
    // It holds until the page is closed.
  }
}

setTheme(storedTheme());
byId("theme").addEventListener("click", nextTheme);
prefersDark.addEventListener("change", () => setTheme(byId("theme").dataset.theme));
byId("words").addEventListener("input", listTexts);
byId("text-filters").addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", leave);
window.addEventListener("hashchange", go);
go();
