// What both pages need: elements without markup, the API key, and requests whose errors name a field.

/** An element. Text stays text: nothing here ever reads markup, for prompts and responses are anybody's. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") made.toggleAttribute(name, value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const byId = (id) => document.getElementById(id);

export const whole = (number) => number.toLocaleString("en");

// ---- the API key: in memory, and in this tab's storage only if asked to ----

const NAME = "yojo-key";

function stored() {
  try {
    return sessionStorage.getItem(NAME);
  } catch {
    return null; // a browser that keeps nothing
  }
}

/** Lets the key be given. `changed` is called whenever there is another one. */
export function keyForm(changed) {
  const [field, keep, form] = [byId("key"), byId("keep"), byId("key-form")];
  const before = stored();
  field.value = before ?? "";
  keep.checked = before !== null;
  const update = () => {
    try {
      if (keep.checked && field.value) sessionStorage.setItem(NAME, field.value);
      else sessionStorage.removeItem(NAME);
    } catch {}
    byId("key-state").textContent = field.value ? "API key set" : "API key";
  };
  update();
  keep.addEventListener("change", update);
  field.addEventListener("input", update);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    byId("key-error").textContent = "";
    field.removeAttribute("aria-invalid");
    byId("key-box").open = false;
    byId("key-state").focus();
    changed();
  });
}

/** Shows at the key's field why a request was refused, and goes there. */
export function keyRefused(message) {
  byId("key-box").open = true;
  byId("key-error").textContent = message;
  byId("key").setAttribute("aria-invalid", "true");
  byId("key").focus();
}

export const authorization = () => (byId("key").value ? { Authorization: `Bearer ${byId("key").value}` } : {});

// ---- requests ----

/** A request that got no answer of use. `param` names the field that is wrong, such as "responses.3". */
export class Failure extends Error {
  constructor(status, message, param = null, after = null) {
    super(message);
    this.status = status;
    this.param = param;
    this.after = after;
  }
}

/** What an endpoint says, as JSON. Throws a Failure; or an AbortError, if `signal` says so. */
export async function ask(path, { signal, ...body } = {}) {
  const sent = "json" in body ? { method: "POST", body: body.json } : {};
  const headers = { Accept: "application/json", ...authorization(), ..."json" in body ? { "Content-Type": "application/json" } : {} };
  let reply, said;
  try {
    reply = await fetch(path, { ...sent, headers, signal, cache: "no-store" });
    said = await reply.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "The server cannot be reached.");
  }
  let read = null;
  try {
    read = JSON.parse(said);
  } catch {
    if (reply.ok) throw new Failure(reply.status, "The server's answer is not JSON.");
  }
  if (!reply.ok && !(path === "ready" && read && "ready" in read)) {
    const { message, param } = read?.error ?? {};
    throw new Failure(reply.status, message ?? `The server answered ${reply.status}.`, param ?? null, reply.headers.get("Retry-After"));
  }
  return read;
}
