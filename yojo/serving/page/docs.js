// The page at /docs: every endpoint of openapi.json (OpenAPI 3.1) with its fields, an example to edit and try, and a curl line.
import { ask, authorization, byId, element, Failure, keyForm, keyRefused } from "./parts.js";

const VERBS = ["get", "post", "put", "patch", "delete"];
const DEEPEST = 8; // of examples that are made up: schemas may hold themselves
let spec = null;

// ---- schemas ----

function resolve(schema) {
  let found = schema ?? {};
  for (let step = 0; found.$ref && step < DEEPEST; step++) {
    const { $ref, ...beside } = found;
    const keys = $ref.replace(/^#\//, "").split("/").map((key) => key.replaceAll("~1", "/").replaceAll("~0", "~"));
    found = { ...keys.reduce((inside, key) => inside?.[key], spec), ...beside };
  }
  return found.allOf ? found.allOf.map(resolve).reduce(merged, found) : found;
}

const merged = (one, other) => ({
  ...other, ...one,
  properties: { ...other.properties, ...one.properties },
  required: [...(other.required ?? []), ...(one.required ?? [])],
});
const refName = (schema) => schema?.$ref?.split("/").at(-1);
const choices = (schema) => schema?.anyOf ?? schema?.oneOf;

/** A schema's type in words, such as "string or list of Message". */
function type(schema) {
  if (schema === undefined || schema === true) return "anything";
  if (refName(schema)) return refName(schema);
  if (choices(schema)) return [...new Set(choices(schema).map(type))].join(" or ");
  if (schema.allOf?.length === 1) return type(schema.allOf[0]);
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (Array.isArray(schema.type)) return schema.type.map((one) => type({ ...schema, type: one })).join(" or ");
  if (schema.prefixItems) return `[${schema.prefixItems.map(type).join(", ")}]`;
  if (schema.type === "array") return schema.items ? `list of ${type(schema.items)}` : "list";
  if (schema.contentMediaType || schema.format === "binary") return "file";
  const values = schema.additionalProperties;
  if (schema.type === "object" && values && values !== true) return `object of ${type(values)}`;
  return schema.type ?? (schema.properties ? "object" : "anything");
}

const BOUNDS = {
  minimum: "at least", exclusiveMinimum: "above", maximum: "at most", exclusiveMaximum: "below", minLength: "characters, at least",
  maxLength: "characters, at most", minItems: "items, at least", maxItems: "items, at most", pattern: "matches", format: "format",
};

/** What else a schema says of values, in short: bounds, also those of its choices, and the default. */
function bounds(schema) {
  const said = [schema, ...(choices(schema) ?? [])].flatMap((one) =>
    Object.entries(BOUNDS).filter(([name]) => one?.[name] !== undefined).map(([name, words]) => `${words} ${one[name]}`),
  );
  if (schema?.default !== undefined && schema.default !== null) said.push(`default ${JSON.stringify(schema.default)}`);
  return [...new Set(said)].join(", ");
}

/** Names of the schemas that a schema is made of, each once, in the order in which they are met. */
function parts(schema, met = []) {
  if (!schema || typeof schema !== "object") return met;
  const name = refName(schema);
  if (name && met.includes(name)) return met;
  if (name) met.push(name);
  const full = resolve(schema);
  for (const inner of [full.items, full.additionalProperties, ...(full.prefixItems ?? []), ...(choices(full) ?? []), ...Object.values(full.properties ?? {})]) parts(inner, met);
  return met;
}

/** An example of a schema: its own, or one made up of its required fields. */
function sample(schema, depth = 0) {
  const full = resolve(schema);
  const given = full.examples?.[0] ?? full.example ?? full.const ?? full.default ?? full.enum?.[0];
  if (given !== undefined || depth > DEEPEST) return given ?? null;
  const [first] = (choices(full) ?? []).filter((one) => one.type !== "null");
  if (first) return sample(first, depth + 1);
  if (full.properties) {
    const wanted = Object.entries(full.properties).filter(([name, inner]) => full.required?.includes(name) || inner.examples);
    return Object.fromEntries(wanted.map(([name, inner]) => [name, sample(inner, depth + 1)]));
  }
  const kind = Array.isArray(full.type) ? full.type[0] : full.type;
  if (kind === "array") return full.items ? [sample(full.items, depth + 1)] : [];
  return { string: "text", integer: full.minimum ?? 0, number: full.minimum ?? 0, boolean: false, object: {} }[kind] ?? null;
}

/** The examples of a content: [name, value], at least one. */
function examples({ schema, example, examples: named }) {
  if (example !== undefined) return [["example", example]];
  if (named) return Object.entries(named).map(([name, one]) => [resolve(one).summary ?? name, resolve(one).value]);
  const own = resolve(schema).examples ?? [];
  return own.length ? own.map((value, index) => [`example ${index + 1}`, value]) : [["example", sample(schema)]];
}

// ---- what is shown ----

/** Text with `code` in it, as elements. */
const prose = (text) => (text ?? "").split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
const shownJson = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));

function table(head, rows, label) {
  const cells = head.map((name) => element("th", { scope: "col" }, name));
  return element("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": label }, element("table", {}, element("thead", {}, element("tr", {}, ...cells)), element("tbody", {}, ...rows)));
}

function row(name, schema, required, description, ...cells) {
  const note = bounds(schema) || bounds(resolve(schema));
  return element(
    "tr", {},
    element("th", { scope: "row" }, element("code", {}, name), " ", required ? element("span", { class: "must" }, "required") : null),
    element("td", {}, type(schema), note ? element("span", { class: "note" }, note) : null),
    element("td", {}, ...prose(description ?? resolve(schema).description), ...cells),
  );
}

/** Tables of fields: one of each object that a schema is made of. */
function fields(schema) {
  const objects = parts(schema).map((name) => [name, resolve({ $ref: `#/components/schemas/${name}` })]);
  if (resolve(schema).properties && !refName(schema)) objects.unshift(["Fields", resolve(schema)]);
  return objects.filter(([, { properties }]) => properties).map(([name, { properties, required, description }], index) =>
    element(
      "details", { open: index === 0 }, element("summary", {}, name),
      index && description ? element("p", { class: "said note" }, ...prose(description)) : null,
      table(["Field", "Type", "Meaning"], Object.entries(properties).map(([field, inner]) => row(field, inner, required?.includes(field), inner.description)), `Fields of ${name}`),
    ),
  );
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function operation(path, verb, described) {
  const id = `${verb}${path.replaceAll(/[^\w]+/g, "-")}`;
  const inputs = []; // [parameter, <input>]
  let update = () => {};
  const entry = (label, more = {}) => element("input", { type: "text", "aria-label": label, oninput: () => update(), autocomplete: "off", ...more });
  const given = (described.parameters ?? []).map(resolve).map((parameter) => {
    const input = entry(`${parameter.name} (${parameter.in})`);
    inputs.push([parameter, input]);
    return row(`${parameter.name}`, parameter.schema, parameter.required, parameter.description, element("span", { class: "note" }, `in the ${parameter.in}`), input);
  });
  const content = Object.entries(resolve(described.requestBody).content ?? {});
  const kind = element("select", { "aria-label": "Sent as" }, ...content.map(([name]) => element("option", {}, name)));
  const body = element("div", { class: "reply" });
  let read = () => undefined; // the body that is sent
  let line = () => []; // its part of the curl line
  const text = element("textarea", { class: "code", rows: 4, spellcheck: "false", id: `${id}-body`, "aria-describedby": `${id}-error`, oninput: () => update() });
  const error = element("p", { class: "error", role: "alert", id: `${id}-error` });

  function contentChosen() {
    const [name, media] = content.find(([one]) => one === kind.value) ?? content[0];
    body.replaceChildren(...fields(media.schema));
    if (name.startsWith("multipart/")) {
      const boxes = Object.entries(resolve(media.schema).properties ?? {}).map(([field, schema]) => {
        const file = type(resolve(schema)).includes("file");
        return [field, file, entry(field, file ? { type: "file", class: "shown", multiple: type(schema).startsWith("list"), onchange: () => update() } : {})];
      });
      body.append(...boxes.map(([field, , box]) => element("label", {}, field, box)));
      read = () => {
        const form = new FormData();
        for (const [field, file, box] of boxes) for (const value of file ? box.files : box.value ? [box.value] : []) form.append(field, value);
        return { body: form };
      };
      line = () => boxes.flatMap(([field, file, box]) => (file ? [...box.files].map((one) => `@${one.name}`) : box.value ? [box.value] : []).map((value) => `-F ${quoted(`${field}=${value}`)}`));
    } else {
      const all = examples(media);
      const which = element("select", { "aria-label": "Example", onchange: () => (fill(all[which.selectedIndex][1]), update()) }, ...all.map(([one]) => element("option", {}, one)));
      const fill = (value) => (text.value = shownJson(value));
      fill(all[0][1]);
      body.append(element("h3", {}, element("label", { for: text.id }, "Request")), ...(all.length > 1 ? [which] : []), text, error);
      read = () => (name.includes("json") && JSON.parse(text.value), { body: text.value, headers: { "Content-Type": name } });
      line = () => [`-H 'Content-Type: ${name}'`, `-d ${quoted(text.value)}`];
    }
    update();
  }

  function address() {
    let place = path.slice(1); // relative: below a proxy's prefix, too
    const query = new URLSearchParams();
    for (const [{ name, in: where }, { value }] of inputs) {
      if (where === "path") place = place.replace(`{${name}}`, value ? encodeURIComponent(value) : `{${name}}`);
      else if (where === "query" && value) query.append(name, value);
    }
    return `${place}${query.size ? `?${query}` : ""}`;
  }
  const headers = () => inputs.filter(([{ in: where }, { value }]) => where === "header" && value).map(([{ name }, { value }]) => [name, value]);

  const curl = element("pre", { tabindex: 0, "aria-label": `curl of ${verb.toUpperCase()} ${path}`, role: "group" });
  update = () => {
    const bearer = byId("key").value ? ["-H \"Authorization: Bearer $YOJO_KEY\""] : []; // the key itself stands nowhere
    const all = [...bearer, ...headers().map(([name, value]) => `-H ${quoted(`${name}: ${value}`)}`), ...line()];
    const target = new URL(address(), document.baseURI).href.replaceAll("%7B", "{").replaceAll("%7D", "}");
    curl.textContent = [`curl ${verb === "get" ? "" : `-X ${verb.toUpperCase()} `}${quoted(target)}`, ...all].join(" \\\n  ");
  };
  const replied = element("div", { class: "replied", role: "status" });
  async function attempt() {
    error.textContent = "";
    text.removeAttribute("aria-invalid");
    let sent;
    try {
      sent = read();
    } catch (broken) {
      error.textContent = `This is not JSON: ${broken.message}`;
      text.setAttribute("aria-invalid", "true");
      return text.focus();
    }
    replied.replaceChildren("Asking …");
    try {
      const reply = await fetch(address(), { method: verb.toUpperCase(), body: sent?.body, headers: { ...authorization(), ...sent?.headers, ...Object.fromEntries(headers()) }, cache: "no-store" });
      const said = await reply.text();
      const json = (reply.headers.get("Content-Type") ?? "").includes("json");
      const heads = ["Yojo-Fingerprint", "Retry-After"].filter((name) => reply.headers.has(name)).map((name) => `${name}: ${reply.headers.get(name)}`);
      replied.replaceChildren(
        element("p", {}, element("strong", { "data-kind": reply.ok ? "good" : "bad" }, `${reply.status} ${reply.statusText}`), heads.length ? ` · ${heads.join(" · ")}` : null),
        element("pre", { tabindex: 0, role: "group", "aria-label": "Reply" }, json && said ? shownJson(JSON.parse(said)) : said),
      );
    } catch (broken) {
      replied.replaceChildren(element("p", { class: "error" }, `No reply: ${broken.message}`));
    }
  }

  const replies = Object.entries(described.responses ?? {}).map(([status, one]) => {
    const { description, content: offered } = resolve(one);
    const [media] = Object.entries(offered ?? {});
    const heads = element("summary", {}, `${status} `, element("span", { class: "note" }, ...prose(description)));
    if (!media || !Object.keys(media[1]).length) return element("p", { class: "plain" }, `${status} `, element("span", { class: "note" }, ...prose(description)));
    const made = resolve(media[1].schema);
    const known = media[1].example !== undefined || media[1].examples || made.properties || made.items || choices(made);
    return element("details", {}, heads, element("div", { class: "reply" }, known ? element("pre", { tabindex: 0, role: "group", "aria-label": `Example of ${status}` }, shownJson(examples(media[1])[0][1])) : element("p", { class: "note" }, media[0]), ...fields(media[1].schema)));
  });
  if (content.length) contentChosen();
  kind.addEventListener("change", contentChosen);
  update();
  byId("key").addEventListener("input", () => update());
  byId("index").append(element("li", {}, element("a", { href: `#${id}` }, element("span", { class: `verb ${verb}` }, verb.toUpperCase()), path)));
  return element(
    "section", { class: "card operation", id, "aria-labelledby": `${id}-title` },
    element("h2", { id: `${id}-title` }, element("span", { class: `verb ${verb}` }, verb.toUpperCase()), element("code", {}, path), element("small", {}, described.summary ?? "")),
    described.description ? element("p", { class: "said" }, ...prose(described.description)) : null,
    given.length ? table(["Parameter", "Type", "Meaning"], given, "Parameters") : null,
    content.length > 1 ? element("label", {}, "Sent as", kind) : null, body,
    element("button", { type: "button", class: "small", onclick: attempt, "aria-label": `Try it: ${verb.toUpperCase()} ${path}` }, "Try it"), replied,
    element("h3", {}, "With curl"), curl,
    element("h3", {}, "Replies"), ...replies,
  );
}

async function load() {
  byId("docs-error").textContent = "";
  try {
    spec = await ask("openapi.json");
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (error.status === 401) keyRefused(error.message);
    else byId("docs-error").textContent = error.message;
    return;
  }
  byId("title").textContent = spec.info?.title ?? "API";
  byId("about").replaceChildren(...prose(spec.info?.description));
  byId("index").replaceChildren();
  const found = Object.entries(spec.paths ?? {}).flatMap(([path, item]) => VERBS.filter((verb) => item[verb]).map((verb) => [path, verb, { ...item[verb], parameters: [...(item.parameters ?? []), ...(item[verb].parameters ?? [])] }]));
  byId("operations").replaceChildren(...found.map((one) => operation(...one)));
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

keyForm(load);
load();
