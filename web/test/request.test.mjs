import assert from "node:assert/strict";
import { execFileSync, spawnSync } from "node:child_process";
import { test } from "node:test";
import { asCurl, asPython, NUMBERS, problemOf, requestFor } from "../src/request.js";
import { append, newConversation } from "../src/tree.js";

const ORIGIN = "http://127.0.0.1:8000/";
const NASTY = `it's "quoted" \\ $HOME \`id\` !\n\ttab, ü, 🦦, \u2028, \u0000, ''' and """`;

function conversation(...said) {
  return said.reduce((one, [role, content]) => append(one, one.leaf, { role, content }), newConversation({}));
}

test("only what was filled in is sent", () => {
  const talk = conversation(["user", "hi"]);
  const options = {
    model: "m",
    system: " ",
    logprobs: false,
    temperature: "",
    top_p: "0.5",
    seed: "abc",
    max_tokens: " 7 ",
  };
  assert.deepEqual(requestFor(talk, talk.leaf, options), {
    model: "m",
    messages: [{ role: "user", content: "hi" }],
    top_p: 0.5,
    max_tokens: 7,
  });
});

test("the system prompt comes first, empty answers are left out", () => {
  const talk = conversation(["user", "one"], ["assistant", ""], ["user", "two"]);
  const body = requestFor(talk, talk.leaf, { model: "m", system: "Be brief.", logprobs: true });
  assert.deepEqual(
    body.messages.map(({ content }) => content),
    ["Be brief.", "one", "two"],
  );
  assert.deepEqual([body.logprobs, body.top_logprobs], [true, 5]);
});

test("numbers are checked", () => {
  const [temperature, , maxTokens] = NUMBERS;
  assert.equal(problemOf(temperature, undefined), "");
  assert.equal(problemOf(temperature, " "), "");
  assert.equal(problemOf(temperature, "0.7"), "");
  assert.match(problemOf(temperature, "warm"), /number/);
  assert.match(problemOf(temperature, "2.1"), /from 0 to 2/);
  assert.match(problemOf(maxTokens, "1.5"), /whole/);
});

test("curl sends exactly this body", () => {
  const body = { model: "m", messages: [{ role: "user", content: NASTY }], seed: 7, logprobs: true };
  const command = asCurl(body, ORIGIN, true).replace(/^curl/, "printf '%s\\0'");
  const words = execFileSync("sh", ["-c", command], { env: { SLUICE_API_KEY: "secret" } })
    .toString()
    .split("\0");
  assert.equal(words[0], `${ORIGIN}v1/chat/completions`);
  assert.ok(words.includes("Authorization: Bearer secret"));
  assert.deepEqual(JSON.parse(words[words.indexOf("-d") + 1]), body);
});

const hasPython = spawnSync("python3", ["--version"]).status === 0;

test("so does Python", { skip: !hasPython && "there is no python3" }, () => {
  const body = {
    model: "m",
    messages: [{ role: "user", content: NASTY }],
    seed: -7,
    temperature: 0.5,
    logprobs: true,
    stop: null,
  };
  const fake = [
    "import json, sys, types",
    "def create(**body): print(json.dumps(body)); raise SystemExit",
    "client = types.SimpleNamespace(chat=types.SimpleNamespace(completions=types.SimpleNamespace(create=create)))",
    "sys.modules['openai'] = types.SimpleNamespace(OpenAI=lambda **options: client)",
  ].join("\n");
  for (const hasKey of [false, true]) {
    const code = `${fake}\n${asPython(body, ORIGIN, hasKey)}`;
    const env = { ...process.env, SLUICE_API_KEY: "secret", PYTHONIOENCODING: "utf-8" };
    assert.deepEqual(JSON.parse(execFileSync("python3", ["-"], { input: code, env })), body);
  }
});
