import assert from "node:assert/strict";
import { test } from "node:test";
import { describeHealth } from "../src/health.js";

const model = (name, group, ready = false) => ({ model: name, ready, groups: [group] });

test("what keeps the server from answering", () => {
  assert.equal(describeHealth({ status: "ready", models: [] }), "");
  assert.match(describeHealth(null), /does not answer/);
  assert.match(describeHealth({ status: "draining", models: [] }), /shutting down/);
  const models = [
    model("a", { state: "starting", phase: "load", percent: 54 }),
    model("b", { state: "ready" }, true),
    model("c", { state: "failed" }),
    model("d", { state: "restarting", phase: null, percent: null }),
  ];
  const said = describeHealth({ status: "loading", models });
  assert.match(said, /^a is loading \(load, 54 %\)\. c could not be started; .* d is loading\.$/);
});
