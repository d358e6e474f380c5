// The mask of a packed row: a square whose rows look and whose columns are seen, as a drawing and as a table.
import { element, whole } from "./parts.js";

const LABEL = 13; // pixels that a label needs
const LEFT = 84;
const TOP = 20;

/** Names of a row's segments: "Prompt", "Answer 2", and with several orders "Answer 2 in order 1". */
export function names(row) {
  const met = new Map();
  return row.segments.map(({ kind, response }) => {
    if (kind === "prompt") return "Prompt";
    met.set(response, (met.get(response) ?? 0) + 1);
    return `Answer ${response + 1}${row.orders > 1 ? ` in order ${met.get(response)}` : ""}`;
  });
}

/**
 * Draws who sees whom.
 * @param svg an empty <svg>: drawn in pixels as wide as it is shown, so that labels keep their size.
 * @param row of a reply: segments {kind, response, tokens, sees} as they stand in the packed row.
 * @param evenly every segment as large as any other, for prompts that leave no room to the answers; else by tokens.
 */
export function draw(svg, row, evenly) {
  const { segments } = row;
  const sizes = segments.map(({ tokens }) => (evenly ? 1 : tokens));
  const side = Math.max(svg.clientWidth - LEFT - 1, 60);
  const unit = side / sizes.reduce((sum, size) => sum + size, 0);
  const starts = [0];
  for (const size of sizes) starts.push(starts.at(-1) + size * unit);
  const part = (tag, attributes, text) => {
    const made = document.createElementNS(svg.namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text) made.textContent = text;
    svg.append(made);
    return made;
  };
  const at = (index) => starts[index].toFixed(2);
  const block = (i, j) => `M${at(j)} ${at(i)}H${at(j + 1)}V${at(i + 1)}H${at(j)}Z`;
  // Within a segment a token sees itself and those before it: a triangle.
  const triangle = (i) => `M${at(i)} ${at(i)}L${at(i + 1)} ${at(i + 1)}H${at(i)}Z`;
  const paths = { prompt: "", own: "", earlier: "" }; // three paths, however many segments there are
  segments.forEach(({ kind, sees }, i) => {
    paths[kind === "prompt" ? "prompt" : "own"] += triangle(i);
    for (const j of sees) if (j !== i) paths[segments[j].kind === "prompt" ? "prompt" : "earlier"] += block(i, j);
  });
  svg.replaceChildren();
  svg.setAttribute("viewBox", `0 0 ${side + LEFT + 1} ${side + TOP + 1}`);
  svg.setAttribute("height", side + TOP + 1);
  const shift = `translate(${LEFT} ${TOP})`;
  part("rect", { class: "ground", width: side, height: side, transform: shift });
  for (const [name, d] of Object.entries(paths)) if (d) part("path", { class: name, d, transform: shift });
  const inner = starts.slice(1, -1).map((start) => `M0 ${start.toFixed(2)}H${side}M${start.toFixed(2)} 0V${side}`);
  if (inner.length && side / segments.length > 4) part("path", { class: "border", d: inner.join(""), transform: shift });
  part("rect", { class: "frame", width: side, height: side, transform: shift });
  let free = 0;
  segments.forEach(({ kind, response }, i) => {
    const [start, size] = [starts[i], starts[i + 1] - starts[i]];
    const middle = start + size / 2;
    const y = Math.min(Math.max(middle, LABEL / 2), side - LABEL / 2);
    if (y - LABEL / 2 < free - 0.5) return; // thin segments share the room: one of them has a label
    free = y + LABEL / 2;
    part("text", { x: LEFT - 8, y: TOP + y, class: "row-label" }, kind === "prompt" ? "Prompt" : `Answer ${response + 1}`);
    if (size >= (kind === "prompt" ? 44 : LABEL + 3)) {
      part("text", { x: LEFT + middle, y: TOP - 7, class: "column-label" }, kind === "prompt" ? "Prompt" : `${response + 1}`);
    }
  });
}

/** The same as rows of a table: segment, tokens, and which segments before it it sees. */
export function rows(row) {
  const called = names(row);
  return row.segments.map(({ tokens, sees }, i) => {
    const others = sees.filter((j) => j !== i).map((j) => called[j]);
    return element(
      "tr", {},
      element("th", { scope: "row" }, called[i]),
      element("td", { class: "number" }, whole(tokens)),
      element("td", {}, [...others, "itself"].join(", ")),
    );
  });
}

/** The drawing in a sentence. */
export function described(row) {
  const tokens = row.segments.reduce((sum, segment) => sum + segment.tokens, 0);
  const answers = new Set(row.segments.filter(({ kind }) => kind !== "prompt").map(({ response }) => response));
  const orders = row.orders > 1 ? `, in ${row.orders} orders` : "";
  const how = row.mode === "isolated" ? "Each answer sees the prompt and itself, never another answer" : `Each answer sees the prompt and the answers before it${orders && " in its order"}`;
  return `One row of ${whole(tokens)} tokens holds the prompt and ${answers.size === 1 ? "one answer" : `${answers.size} answers`}${orders}. ${how}.`;
}
