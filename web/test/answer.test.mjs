import assert from "node:assert/strict";
import { test } from "node:test";
import { Answer, describeStats } from "../src/answer.js";

const chunk = (delta, rest = {}) => ({ choices: [{ index: 0, delta, ...rest }] });

test("text, reasoning, tokens and the end", () => {
  const answer = new Answer(0);
  answer.take(chunk({ role: "assistant", content: "" }), 10);
  answer.take(chunk({ reasoning_content: "Hm." }), 100);
  answer.take(
    chunk({ content: "Yes", reasoning_content: null }, { logprobs: { content: [{ token: "Yes" }] } }),
    200,
  );
  answer.take(chunk({ content: "!" }, { logprobs: null }), 300);
  answer.take(chunk({}, { finish_reason: "stop" }), 400);
  answer.take({ choices: [], usage: { completion_tokens: 5 } }, 500);
  assert.equal(answer.content, "Yes!");
  assert.equal(answer.reasoning, "Hm.");
  assert.deepEqual(answer.tokens, [{ token: "Yes" }]);
  assert.equal(answer.finishReason, "stop");
  assert.deepEqual(answer.stats, { numTokens: 5, ttft: 0.1, rate: 4 / 0.2 });
});

test("nothing is made up before there is something", () => {
  assert.deepEqual(new Answer(0).stats, { numTokens: null, ttft: null, rate: null });
});

test("stats in words", () => {
  assert.equal(
    describeStats({ numTokens: 34, ttft: 0.0412, rate: 211.7 }),
    "34 tokens · 212 tokens/s · first token after 41 ms",
  );
  assert.equal(describeStats({ numTokens: 1, ttft: 2.34, rate: null }), "1 token · first token after 2.3 s");
  assert.equal(describeStats({ numTokens: null, ttft: null, rate: null }), "");
});
