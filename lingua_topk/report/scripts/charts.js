// Small drawings.

const SVG = "http://www.w3.org/2000/svg";

function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Bars of counts between 0 and `largest`; heights by square root, so that rare ones are seen. */
function histogram(counts, largest) {
  const [width, height] = [320, 90];
  const most = Math.max(...counts, 1);
  const step = width / counts.length;
  const total = counts.reduce((sum, n) => sum + n, 0);
  const figure = drawn("svg", {
    class: "histogram", viewBox: `0 0 ${width} ${height + 16}`, role: "img",
    "aria-label": `Values of ${grouped(total)} firings, from 0 to ${short(largest)}`,
  });
  counts.forEach((n, i) => {
    const high = n ? Math.max(Math.sqrt(n / most) * height, 1.5) : 0;
    const [from, to] = [i, i + 1].map((edge) => short((edge * largest) / counts.length));
    const bar = drawn("rect", {
      x: i * step + 0.5, width: step - 1, y: height - high, height: high,
    });
    bar.append(drawn("title", {}, `${from} to ${to}: ${grouped(n)}`));
    figure.append(bar);
  });
  figure.append(
    drawn("line", { x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 }),
    drawn("text", { x: 0, y: height + 13 }, "0"),
    drawn("text", { x: width, y: height + 13, "text-anchor": "end" }, short(largest)),
  );
  return figure;
}

/** A line of values over steps; gaps where there is none. `mark`: a step to point out. */
function sparkline(steps, values, { low = 0, high, label, mark }) {
  const [width, height, above] = [320, 76, 14];
  const known = [...values].filter((value) => !Number.isNaN(value));
  const top = high ?? Math.max(...known, 1e-9);
  const span = Math.max(steps.at(-1) - steps[0], 1);
  const x = (step) => ((step - steps[0]) / span) * (width - 8) + 4;
  const y = (value) => height - 4 - ((value - low) / (top - low)) * (height - 4 - above);
  const figure = drawn("svg", {
    class: "sparkline", viewBox: `0 0 ${width} ${height + 14}`, role: "img", "aria-label": label,
  });
  if (mark != null) {
    figure.append(drawn("line", { x1: x(mark), x2: x(mark), y1: 0, y2: height, class: "mark" }));
  }
  let path = "";
  steps.forEach((step, i) => {
    if (Number.isNaN(values[i])) return;
    const begins = i === 0 || Number.isNaN(values[i - 1]);
    path += `${begins ? "M" : "L"}${x(step).toFixed(1)} ${y(values[i]).toFixed(1)}`;
    const dot = drawn("circle", { cx: x(step), cy: y(values[i]), r: 2.5 });
    dot.append(drawn("title", {}, `step ${grouped(step)}: ${short(values[i])}`));
    figure.append(dot);
  });
  figure.prepend(drawn("path", { d: path, fill: "none" }));
  figure.append(
    drawn("line", { x1: 0, x2: width, y1: height + 0.5, y2: height + 0.5 }),
    drawn("text", { x: 0, y: height + 12 }, grouped(steps[0])),
    drawn("text", { x: width, y: height + 12, "text-anchor": "end" }, grouped(steps.at(-1))),
    drawn("text", { x: width, y: 9, "text-anchor": "end" }, short(top)),
  );
  return figure;
}

/** A thin bar for a share of the largest in a list. */
function bar(share, negative = false) {
  const inside = element("span", { class: negative ? "negative" : "" });
  inside.style.setProperty("inline-size", `${(100 * Math.min(Math.abs(share), 1)).toFixed(1)}%`);
  return element("span", { class: "bar", "aria-hidden": "true" }, inside);
}
