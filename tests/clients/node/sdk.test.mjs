// OpenAI's SDK for Node against the real server: `make test-clients`.
import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { serve, serveModule } from "../../servers.mjs";

const PATIENCE = 120_000; // longer than anything here takes on a busy machine
const MODEL = "sluice-demo";
const KEY = "a-key-for-tests";
const asking = (content) => ({ model: MODEL, temperature: 0, messages: [{ role: "user", content }] });
const clientOf = (baseURL, apiKey = KEY) =>
  new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: PATIENCE });

let server, client;
before(
  async () => {
    server = await serve("--api-key", KEY, "--dtype", "float32");
    client = clientOf(`${server.url}v1`);
  },
  { timeout: PATIENCE },
);
after(() => server?.end());

test("models", { timeout: PATIENCE }, async () => {
  const found = [];
  for await (const model of client.models.list()) found.push(model.id);
  assert.deepEqual(found, [MODEL]);
  assert.equal((await client.models.retrieve(MODEL)).id, MODEL);
});

test("a stream says what a whole answer says", { timeout: PATIENCE }, async () => {
  const { data: whole, request_id } = await client.chat.completions
    .create(asking("What is Sluice?"))
    .withResponse();
  assert.match(request_id, /^req_/);
  const chunks = await client.chat.completions.create({
    ...asking("What is Sluice?"),
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = "";
  let usage;
  for await (const chunk of chunks) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole.choices[0].message.content);
  assert.match(text, /serving gateway/);
  assert.equal(usage.completion_tokens, whole.usage.completion_tokens);
});

test("the stream helper's events, snapshots and final message", { timeout: PATIENCE }, async () => {
  const stream = client.chat.completions.stream({
    ...asking("What is 3 + 4?"),
    logprobs: true,
    top_logprobs: 2,
    stream_options: { include_usage: true },
  });
  const deltas = [];
  const done = [];
  stream.on("content.delta", ({ delta, snapshot }) => {
    deltas.push(delta);
    assert.equal(snapshot, deltas.join(""));
  });
  stream.on("content.done", ({ content }) => done.push(content));
  const completion = await stream.finalChatCompletion();
  assert.deepEqual(done, ["3 + 4 = 7."]);
  assert.equal(await stream.finalContent(), "3 + 4 = 7.");
  assert.ok(deltas.length > 1);
  const [choice] = completion.choices;
  assert.equal(choice.finish_reason, "stop");
  assert.equal(choice.logprobs.content.map(({ token }) => token).join(""), "3 + 4 = 7.");
  assert.ok(choice.logprobs.content.every(({ top_logprobs }) => top_logprobs.length === 2));
  assert.equal((await stream.totalUsage()).completion_tokens, completion.usage.completion_tokens);
});

test("a stream that is left", { timeout: PATIENCE }, async () => {
  const stream = await client.chat.completions.create({
    ...asking("Hello!"),
    stream: true,
    ignore_eos: true,
  });
  let number = 0;
  for await (const _ of stream) if (++number === 5) break;
  assert.equal(stream.controller.signal.aborted, true);
  for (;;) {
    const headers = { authorization: `Bearer ${KEY}` };
    const text = await (await fetch(`${server.url}metrics`, { headers })).text();
    if (/^sluice:num_requests_running\{.*\} 0\.0$/m.test(text)) break;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
});

const Dog = z.object({ name: z.string().max(12), colour: z.enum(["brown", "black"]), is_old: z.boolean() });

test("parse gives objects of a zod schema", { timeout: PATIENCE }, async () => {
  const completion = await client.chat.completions.parse({
    ...asking("A dog"),
    n: 4,
    temperature: 2,
    seed: 1,
    response_format: zodResponseFormat(Dog, "dog"),
  });
  assert.equal(completion.choices.length, 4);
  for (const { message } of completion.choices) assert.deepEqual(Dog.parse(message.parsed), message.parsed);
});

test("completions, with a batch of prompts", { timeout: PATIENCE }, async () => {
  const prompt = ["Sluice is", "Tensor parallelism"];
  const { choices, usage } = await client.completions.create({
    model: MODEL,
    prompt,
    max_tokens: 5,
    echo: true,
    logprobs: 1,
  });
  assert.deepEqual(
    choices.map(({ index, text }) => [index, text.startsWith(prompt[index])]),
    [
      [0, true],
      [1, true],
    ],
  );
  assert.equal(choices[0].logprobs.token_logprobs[0], null);
  assert.ok(usage.completion_tokens <= 10);
});

test("responses: whole, as a stream, after another one, parsed", { timeout: PATIENCE }, async () => {
  const first = await client.responses.create({ model: MODEL, input: "What is 3 + 4?", temperature: 0 });
  assert.equal(first.output_text, "3 + 4 = 7.");
  const second = client.responses.stream({
    model: MODEL,
    input: "What is Sluice?",
    previous_response_id: first.id,
    temperature: 0,
  });
  let text = "";
  second.on("response.output_text.delta", ({ delta }) => (text += delta));
  const final = await second.finalResponse();
  assert.equal(final.output_text, text);
  assert.equal(final.status, "completed");
  assert.ok(final.usage.input_tokens > first.usage.input_tokens);
  const parsed = await client.responses.parse({
    model: MODEL,
    input: "A dog",
    text: { format: zodTextFormat(Dog, "dog") },
  });
  assert.deepEqual(Dog.parse(parsed.output_parsed), parsed.output_parsed);
});

test("errors are the SDK's own", { timeout: PATIENCE }, async () => {
  await assert.rejects(client.chat.completions.create({ ...asking("hi"), model: "other" }), (error) => {
    assert.ok(error instanceof OpenAI.NotFoundError);
    assert.equal(error.code, "model_not_found");
    return true;
  });
  await assert.rejects(client.chat.completions.create({ ...asking("hi"), temperature: 3 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  await assert.rejects(
    clientOf(`${server.url}v1`, "wrong").models.list(),
    (error) => error instanceof OpenAI.AuthenticationError,
  );
});

const CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Basel"}}\n</tool_call>';
const loop = (asked) => ({
  model: "demo",
  messages: [{ role: "user", content: "How is the weather in Basel?" }],
  tools: [
    zodFunction({
      name: "weather",
      parameters: z.object({ city: z.string() }),
      function: ({ city }) => {
        asked.push(city);
        return `Rain in ${city}`;
      },
    }),
  ],
});

for (const stream of [false, true]) {
  test(`runTools goes on until there is an answer, stream: ${stream}`, { timeout: PATIENCE }, async () => {
    const scripted = await serveModule("tests.clients.scripted_server", CALL, "Take an umbrella.");
    try {
      const asked = [];
      const runner = clientOf(scripted.url).chat.completions.runTools({ ...loop(asked), stream });
      assert.equal(await runner.finalContent(), "Take an umbrella.");
      assert.deepEqual(asked, ["Basel"]);
      const roles = runner.messages.map(({ role }) => role);
      assert.deepEqual(roles, ["user", "assistant", "tool", "assistant"]);
      assert.equal(runner.messages[2].content, "Rain in Basel");
    } finally {
      await scripted.end();
    }
  });
}
