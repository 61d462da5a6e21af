/** The body of a request, from what the page's fields say; and the same as commands to copy. */
import { pathTo } from "./tree.js";

export const NUMBERS = [
  {
    name: "temperature",
    label: "Temperature",
    min: 0,
    max: 2,
    step: 0.1,
    hint: "0 is greedy; empty: the server's default",
  },
  { name: "top_p", label: "Top p", min: 0, max: 1, step: 0.05 },
  { name: "max_tokens", label: "Max tokens", min: 1, max: 10_000_000, step: 1 },
  { name: "seed", label: "Seed", min: Number.MIN_SAFE_INTEGER, max: Number.MAX_SAFE_INTEGER, step: 1 },
];
const NUM_ALTERNATIVES = 5;

export const DEFAULT_OPTIONS = { model: "", system: "", logprobs: false };

/** What is wrong with a field's text, or "". */
export function problemOf({ min, max, step, label }, text) {
  if (text === undefined || text.trim() === "") return "";
  const value = Number(text);
  if (!Number.isFinite(value)) return `${label} must be a number.`;
  if (step === 1 && !Number.isSafeInteger(value)) return `${label} must be a whole number.`;
  return value < min || value > max ? `${label} must be from ${min} to ${max}.` : "";
}

/** The request that is answered by a message under `id`. */
export function requestFor(conversation, id, options) {
  const said = pathTo(conversation, id).filter(({ role, content }) => role === "user" || content);
  const messages = said.map(({ role, content }) => ({ role, content }));
  if (options.system.trim()) messages.unshift({ role: "system", content: options.system });
  const body = { model: options.model, messages };
  for (const field of NUMBERS) {
    const text = options[field.name];
    if (text?.trim() && !problemOf(field, text)) body[field.name] = Number(text);
  }
  return options.logprobs ? { ...body, logprobs: true, top_logprobs: NUM_ALTERNATIVES } : body;
}

export function asCurl(body, origin, hasKey) {
  const lines = [
    `curl ${shellQuoted(`${origin}v1/chat/completions`)}`,
    "-H 'Content-Type: application/json'",
  ];
  if (hasKey) lines.push('-H "Authorization: Bearer $SLUICE_API_KEY"');
  return [...lines, `-d ${shellQuoted(JSON.stringify(body, null, 2))}`].join(" \\\n  ") + "\n";
}

export function asPython(body, origin, hasKey) {
  const key = hasKey ? 'os.environ["SLUICE_API_KEY"]' : '"none"';
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${pythonOf(value, "    ")},\n`);
  return `${hasKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${pythonOf(`${origin}v1`)}, api_key=${key})
completion = client.chat.completions.create(
${fields.join("")})
print(completion.choices[0].message.content)
`;
}

function shellQuoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** A literal. JSON's strings and numbers are Python's too. */
function pythonOf(value, indent = "") {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const deeper = `${indent}    `;
  if (Array.isArray(value)) {
    return `[\n${value.map((item) => `${deeper}${pythonOf(item, deeper)},\n`).join("")}${indent}]`;
  }
  return `{${Object.entries(value)
    .map(([name, item]) => `${JSON.stringify(name)}: ${pythonOf(item, deeper)}`)
    .join(", ")}}`;
}
