import assert from "node:assert/strict";
import { test } from "node:test";
import { alternativesOf, doubtOf, percentOf, tokenLabel } from "../src/token.js";

test("labels", () => {
  assert.equal(tokenLabel({ token: " a\n\tb" }), "␣a↵⇥b");
  assert.equal(tokenLabel({ token: "" }), "∅");
  assert.equal(tokenLabel({ token: "\ufffd", bytes: [0xe2, 0x82] }), "\\xE2\\x82");
});

test("probabilities", () => {
  assert.equal(percentOf(0), "100.0 %");
  assert.equal(percentOf(Math.log(0.973)), "97.3 %");
  assert.equal(percentOf(-20), "< 0.1 %");
  assert.deepEqual(
    [1, 0.7, 0.5, 0.2, 0.01].map((p) => doubtOf(Math.log(p))),
    [0, 1, 2, 3, 4],
  );
});

test("the drawn token is among the alternatives, once", () => {
  const top_logprobs = [
    { token: "a", bytes: [97], logprob: -0.1 },
    { token: "b", bytes: [98], logprob: -2 },
  ];
  const drawn = (token) => alternativesOf({ ...token, top_logprobs }).map((one) => [one.token, one.isDrawn]);
  assert.deepEqual(drawn({ token: "b", bytes: [98], logprob: -2 }), [
    ["a", false],
    ["b", true],
  ]);
  assert.deepEqual(drawn({ token: "c", bytes: [99], logprob: -9 }), [
    ["a", false],
    ["b", false],
    ["c", true],
  ]);
  assert.deepEqual(alternativesOf({ token: "x", bytes: [120], logprob: 0 }).length, 1);
});
