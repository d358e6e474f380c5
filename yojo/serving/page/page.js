// The page at /: images, a prompt and answers go to POST /score; the ranking and the mask of the row come back.
import { ask, byId, element, Failure, keyForm, keyRefused, whole } from "./parts.js";
import * as mask from "./mask.js";

let model = null; // of GET /v1/models
let shown = null; // {reply, ranked, seconds} of the results that stand there
let running = null; // the AbortController of the request on its way
let count = 0; // for ids, none of which is used twice

// ---- lists whose items can be moved and removed: images and answers ----

/** Tells those who do not see it what has happened. */
const tell = (text) => (byId("moved").textContent = text);

/** Buttons of an item; `refocus(next)` is called when it is removed, with the item that is to have the focus, or null. */
function controls(item, named, refocus) {
  const move = (step) => (event) => {
    const other = step < 0 ? item.previousElementSibling : item.nextElementSibling;
    if (!other) return;
    if (step < 0) other.before(item);
    else other.after(item);
    changed();
    tell(`${named()} now, of ${item.parentElement.children.length}`);
    event.currentTarget.focus();
  };
  const remove = () => {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    const text = `${named()} removed`;
    item.dispatchEvent(new Event("gone"));
    item.remove();
    changed();
    tell(text);
    refocus(next);
  };
  const button = (text, does, onclick) => element("button", { type: "button", class: "icon", "data-does": does, onclick }, text);
  return element("span", { class: "controls" }, button("↑", "Move up", move(-1)), button("↓", "Move down", move(1)), button("×", "Remove", remove));
}

/** Numbers an item's label and names its buttons after it; the first cannot go up, nor the last down. */
function numbered(list, word) {
  [...list.children].forEach((item, index) => {
    const name = `${word} ${index + 1}`;
    item.querySelector(".name").textContent = name;
    for (const button of item.querySelectorAll("[data-does]")) {
      const does = button.dataset.does;
      button.setAttribute("aria-label", `${does}: ${name.toLowerCase()}`);
      button.title = does;
      const edge = (does === "Move up" && index === 0) || (does === "Move down" && index === list.children.length - 1);
      button.setAttribute("aria-disabled", edge);
    }
  });
}

const answers = byId("answers");
const images = byId("images");

/** After each change of the inputs. */
function changed() {
  numbered(answers, "Answer");
  numbered(images, "Image");
  if (shown) byId("stale").hidden = false;
}

function addAnswer() {
  const id = `answer-${++count}`;
  const item = element("li", { class: "answer" });
  const named = () => item.querySelector(".name").textContent;
  item.append(
    element(
      "div", { class: "line" }, element("label", { class: "name", for: id }),
      controls(item, named, (next) => (next?.querySelector("textarea") ?? byId("add")).focus()),
    ),
    element("textarea", { id, rows: 2, "aria-describedby": `${id}-error` }),
    element("p", { id: `${id}-error`, class: "error", role: "alert" }),
  );
  answers.append(item);
  changed();
  return item.querySelector("textarea");
}

const files = new WeakMap(); // item of the list -> its File

function addImages(chosen) {
  clearErrors();
  for (const file of chosen) {
    if (file.type && !file.type.startsWith("image/")) {
      fail(byId("files"), byId("images-error"), `${file.name} is not an image.`);
      continue;
    }
    const id = `image-${++count}`;
    const address = URL.createObjectURL(file);
    const picture = element("img", { src: address, alt: "" });
    const item = element("li", { class: "image", tabindex: -1, "aria-describedby": `${id}-error`, ongone: () => URL.revokeObjectURL(address) });
    picture.addEventListener("error", () => picture.replaceWith(element("span", { class: "blank" }, "no preview")));
    const named = () => item.querySelector(".name").textContent;
    item.append(
      picture,
      element(
        "div", {},
        element("div", { class: "line" }, element("span", { class: "name" }), controls(item, named, () => byId("files").focus())),
        element("div", { class: "file" }, file.name || "pasted image"),
        element("div", { class: "note" }, `${bytes(file.size)}${file.type ? `, ${file.type.slice("image/".length)}` : ""}`),
        element("p", { id: `${id}-error`, class: "error", role: "alert" }),
      ),
    );
    files.set(item, file);
    images.append(item);
    changed();
    tell(`${file.name || "An image"} added`);
  }
}

const bytes = (number) => (number < 1e5 ? `${(number / 1024).toFixed(1)} KiB` : `${(number / 1048576).toFixed(1)} MiB`);

// ---- errors, beside the field that is wrong ----

function clearErrors() {
  for (const node of document.querySelectorAll(".error")) {
    node.textContent = "";
    node.removeAttribute("tabindex");
  }
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

function fail(field, node, message) {
  node.textContent = message;
  if (field !== node) field.setAttribute("aria-invalid", "true");
  else node.tabIndex = -1; // what belongs to no field takes the focus itself
  field.focus();
}

/** Shows a Failure at the field that it names; `sent` has the items as they were sent. */
function showFailure(failure, sent) {
  const message = failure.after ? `${failure.message} Ask again in ${failure.after} s.` : failure.message;
  if (failure.status === 401) return keyRefused(message);
  const [, field, index] = /^(prompt|responses|images)(?:\.(\d+))?/.exec(failure.param ?? "") ?? [];
  const item = sent[field]?.[index];
  if (item?.isConnected) return fail(item.querySelector("textarea") ?? item, item.querySelector(".error"), message);
  if (field === "prompt") return fail(byId("prompt"), byId("prompt-error"), message);
  if (field === "responses") return fail(byId("add"), byId("answers-error"), message);
  if (field === "images") return fail(byId("files"), byId("images-error"), message);
  const node = byId("form-error");
  fail(node, node, failure.param ? `${failure.param}: ${message}` : message);
}

// ---- scoring ----

/** A file's own bytes as a data URL: what a canvas would make of it has other pixels, and another score. */
function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function body(sent) {
  const limits = model?.limits ?? {};
  const urls = [];
  for (const [index, item] of sent.images.entries()) {
    const file = files.get(item);
    if (file.size > limits.image_bytes) {
      throw new Failure(413, `The file has ${bytes(file.size)}, and the server takes ${bytes(limits.image_bytes)}.`, `images.${index}`);
    }
    try {
      urls.push(await dataUrl(file));
    } catch {
      throw new Failure(0, "The file cannot be read any more.", `images.${index}`);
    }
  }
  const responses = sent.responses.map((item) => item.querySelector("textarea").value);
  const said = { prompt: byId("prompt").value, responses, ...(urls.length ? { images: urls } : {}), details: true };
  const blob = new Blob([JSON.stringify(said)]);
  if (blob.size > limits.body) {
    throw new Failure(413, `All together are ${bytes(blob.size)}, and the server takes ${bytes(limits.body)} at once.`);
  }
  return { blob, responses };
}

async function score() {
  if (running) return;
  clearErrors();
  running = new AbortController();
  busy(true);
  const sent = { responses: [...answers.children], images: [...images.children] };
  const began = performance.now();
  byId("stale").hidden = true;
  try {
    const { blob, responses } = await body(sent);
    const reply = await ask("score", { json: blob, signal: running.signal });
    const edited = byId("stale").hidden === false; // while the answer was on its way
    shown = { reply, ranked: ranking(reply.scores, responses), seconds: (performance.now() - began) / 1000 };
    show();
    byId("stale").hidden = !edited;
  } catch (error) {
    if (shown) byId("stale").hidden = false;
    if (error.name === "AbortError") tell("Cancelled");
    else if (error instanceof Failure) showFailure(error, sent);
    else throw error;
  } finally {
    running = null;
    busy(false);
  }
}

function busy(on) {
  byId("form").setAttribute("aria-busy", on);
  byId("score").setAttribute("aria-disabled", on);
  byId("score").textContent = on ? "Scoring …" : "Score";
  if (!on && document.activeElement === byId("cancel")) byId("score").focus();
  byId("cancel").hidden = !on;
}

// ---- results ----

const signed = (number) => fixed(number).replace("-", "−"); // a true minus, as wide as a plus
function fixed(number) {
  const size = Math.abs(number);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? number.toExponential(3) : number.toFixed(4);
}

function ranking(scores, texts) {
  const ranked = scores.map((value, index) => ({ value, index, text: texts[index] }));
  return ranked.sort((one, other) => other.value - one.value || one.index - other.index);
}

function show() {
  const { reply, ranked } = shown;
  const [best, second] = ranked;
  const named = ({ index }) => `answer ${index + 1}`;
  byId("summary").textContent =
    ranked.length === 1
      ? `One answer scored: ${signed(best.value)}.`
      : best.value === second.value
        ? `${ranked.filter(({ value }) => value === best.value).length} answers of ${ranked.length} share the best score, ${signed(best.value)}.`
        : `Of ${ranked.length} answers, ${named(best)} is the best with ${signed(best.value)}: ${signed(best.value - second.value)} ahead of ${named(second)}.`;
  const comparative = reply.row?.mode === "comparative" && model?.order_free === false && ranked.length > 1;
  byId("order").textContent = comparative ? "This model compares: an answer sees those before it, so their order matters." : "";
  const { usage } = reply;
  const spent = usage?.response_tokens?.reduce((sum, tokens) => sum + tokens, 0);
  const facts = [
    ["Model", reply.model],
    ["Fingerprint", reply.fingerprint],
    ["Tokens", spent === undefined ? null : `${whole(usage.prompt_tokens)} of the prompt, ${whole(spent)} of answers`],
    ["Answered in", `${shown.seconds.toFixed(2)} s`],
  ].filter(([, said]) => said);
  byId("facts").replaceChildren(...facts.map(([name, said]) => element("div", {}, element("dt", {}, name), element("dd", {}, said))));
  byId("empty").hidden = true;
  byId("shown").hidden = false;
  byId("mask-card").hidden = !reply.row;
  if (reply.row) {
    byId("mask-text").textContent = mask.described(reply.row);
    byId("mask-rows").replaceChildren(...mask.rows(reply.row));
    byId("legend-earlier").hidden = reply.row.mode === "isolated";
    redraw();
  }
  showRanking();
  const title = byId("ranking-title").getBoundingClientRect();
  if (title.top < 0 || title.bottom > innerHeight) {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    byId("ranking-title").scrollIntoView({ behavior: still ? "auto" : "smooth" });
  }
}

const chosen = (name) => document.querySelector(`input[name=${name}]:checked`).value;

function showRanking() {
  const { ranked } = shown;
  const values = ranked.map(({ value }) => value);
  const fromZero = chosen("bars") === "zero";
  const [lowest, highest] = [values.at(-1), values[0]];
  const low = fromZero ? Math.min(0, lowest) : lowest;
  const high = fromZero ? Math.max(0, highest) : highest;
  const place = (value) => (high > low ? ((value - low) / (high - low)) * 100 : 100);
  const origin = fromZero ? place(0) : 0;
  const items = ranked.map(({ value, index, text }) => {
    const best = value === highest && ranked.length > 1;
    const bar = element("div", { class: "bar" });
    bar.style.left = `${Math.min(origin, place(value))}%`; // through the object model, which the page's policy lets through
    bar.style.width = `${Math.abs(place(value) - origin)}%`;
    const zero = element("div", { class: "origin" });
    zero.style.left = `${origin}%`;
    const rank = values.indexOf(value) + 1; // those that are equal share a place
    return element(
      "li", { class: best ? "result best" : "result" },
      element(
        "div", { class: "line" },
        element("span", { class: "rank" }, element("span", { class: "hidden" }, "Place "), `${rank}`),
        element("span", { class: "who" }, `Answer ${index + 1}`),
        best ? element("span", { class: "badge" }, "best") : null,
        element("span", { class: "behind" }, value === highest ? "" : `${fixed(highest - value)} behind`),
        element("span", { class: "score", title: `${value}` }, signed(value)),
      ),
      element("div", { class: "track", "aria-hidden": "true" }, bar, zero),
      element("p", { class: "text", role: "group", "aria-label": `Text of answer ${index + 1}` }, text),
    );
  });
  byId("ranking").replaceChildren(...items);
  for (const text of document.querySelectorAll(".ranking .text")) {
    if (text.scrollHeight > text.clientHeight) text.tabIndex = 0; // long texts are scrolled by keyboard
  }
  byId("axis").textContent = fromZero
    ? `Bars start at zero; their axis runs from ${signed(low)} to ${signed(high)}.`
    : `Bars start at the lowest score; their axis runs from ${signed(low)} to ${signed(high)}.`;
}

function redraw() {
  if (shown?.reply.row && !byId("mask-card").hidden) mask.draw(byId("mask"), shown.reply.row, chosen("drawn") === "evenly");
}

// ---- the server: which model, and is it ready ----

function state(text, kind) {
  const node = byId("state");
  if (node.textContent !== text) node.textContent = text;
  node.dataset.kind = kind;
}

async function about() {
  try {
    const ready = await ask("ready");
    model = (await ask("v1/models")).data[0];
    const reasons = (ready.reasons ?? []).join("; ");
    state(ready.ready ? "Ready" : `Not ready${reasons ? `: ${reasons}` : ""}`, ready.ready ? "good" : "bad");
    const length = model.max_length ? `up to ${whole(model.max_length)} tokens` : null;
    const orders = model.permutations > 1 ? `${model.permutations} orders` : null;
    byId("model").replaceChildren(
      element("strong", {}, model.id),
      ...[model.mode, orders, model.dtype, length].filter(Boolean).map((said) => element("span", { class: "fact" }, said)),
    );
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (error.status === 401) state("The server asks for an API key", "bad");
    else state(error.message, "bad");
  }
}

const SECONDS = 15;
async function watch() {
  if (!document.hidden) await about();
  setTimeout(watch, SECONDS * 1000);
}

// ---- what the reader does ----

byId("form").addEventListener("submit", (event) => {
  event.preventDefault();
  score();
});
byId("form").addEventListener("input", () => changed());
byId("add").addEventListener("click", () => addAnswer().focus());
byId("cancel").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    score();
  }
});
byId("files").addEventListener("change", (event) => {
  addImages([...event.target.files]);
  event.target.value = ""; // the same file can be chosen again
});
document.addEventListener("paste", (event) => {
  const pasted = [...event.clipboardData.files];
  const writing = event.target.matches?.("textarea, input") && event.clipboardData.types.includes("text/plain");
  if (!pasted.length || writing) return; // a table copied from an office program is text, too
  event.preventDefault();
  addImages(pasted);
});
let depth = 0; // of elements that a dragged file has entered
const dragging = (on) => byId("drop").classList.toggle("over", on);
const carries = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragenter", (event) => carries(event) && dragging(++depth > 0));
document.addEventListener("dragleave", (event) => carries(event) && dragging(--depth > 0));
document.addEventListener("dragover", (event) => carries(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  if (!carries(event)) return;
  event.preventDefault(); // or the browser would leave the page for the file
  dragging((depth = 0) > 0);
  addImages([...event.dataTransfer.files]);
});
for (const input of document.querySelectorAll("input[name=bars]")) input.addEventListener("change", showRanking);
for (const input of document.querySelectorAll("input[name=drawn]")) input.addEventListener("change", redraw);
new ResizeObserver(redraw).observe(byId("mask-card"));
byId("files").value = "";
addAnswer();
addAnswer();
keyForm(about);
watch();
