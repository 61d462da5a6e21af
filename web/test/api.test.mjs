import assert from "node:assert/strict";
import { createServer } from "node:http";
import { test } from "node:test";
import { ApiError, listModels, readiness, streamChat } from "../src/api.js";

/** Runs `work(base, requests)` against a server that answers with `handler`. */
async function serving(handler, work) {
  const requests = [];
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const piece of request) body += piece;
    requests.push({ url: request.url, headers: request.headers, body });
    handler(response, request);
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  try {
    await work(`http://127.0.0.1:${server.address().port}/`, requests);
  } finally {
    server.closeAllConnections();
    await new Promise((resolve) => server.close(resolve));
  }
}

async function collect(chunks) {
  const found = [];
  try {
    for await (const chunk of chunks) found.push(chunk);
  } catch (error) {
    return { found, error };
  }
  return { found, error: null };
}

const events = (...values) => values.map((value) => `data: ${JSON.stringify(value)}\n\n`).join("");

test("a stream ends with [DONE]; the key and the body are sent", () =>
  serving(
    (response) => response.end(`${events({ a: 1 }, { a: 2 })}data: [DONE]\n\n${events({ a: 3 })}`),
    async (base, requests) => {
      const { found, error } = await collect(streamChat({ model: "m" }, { base, key: "secret" }));
      assert.deepEqual(found, [{ a: 1 }, { a: 2 }]);
      assert.equal(error, null);
      assert.equal(requests[0].url, "/v1/chat/completions");
      assert.equal(requests[0].headers.authorization, "Bearer secret");
      assert.deepEqual(JSON.parse(requests[0].body), { model: "m" });
    },
  ));

test("a stream without [DONE] was cut", () =>
  serving(
    (response) => response.end(events({ a: 1 })),
    async (base) => {
      const { found, error } = await collect(streamChat({}, { base }));
      assert.deepEqual(found, [{ a: 1 }]);
      assert.ok(error instanceof ApiError);
      assert.equal(error.kind, "cut");
    },
  ));

test("so was one whose connection is reset", () =>
  serving(
    (response) => {
      response.write(events({ a: 1 }));
      setTimeout(() => response.socket.destroy(), 100);
    },
    async (base) => {
      const { found, error } = await collect(streamChat({}, { base }));
      assert.deepEqual(found, [{ a: 1 }]);
      assert.equal(error.kind, "cut");
    },
  ));

test("an error event ends the stream with its message", () =>
  serving(
    (response) => response.end(events({ a: 1 }, { error: { message: "The worker died." } })),
    async (base) => {
      const { found, error } = await collect(streamChat({}, { base }));
      assert.deepEqual(found, [{ a: 1 }]);
      assert.deepEqual([error.kind, error.message], ["failed", "The worker died."]);
    },
  ));

test("a refusal is said in the server's words", () =>
  serving(
    (response) => {
      response.statusCode = 401;
      response.end(JSON.stringify({ error: { message: "Incorrect API key" } }));
    },
    async (base) => {
      await assert.rejects(listModels({ base }), {
        kind: "refused",
        status: 401,
        message: "Incorrect API key",
      });
    },
  ));

test("a refusal by something else that stands between", () =>
  serving(
    (response) => {
      response.statusCode = 502;
      response.end("<html>Bad gateway</html>");
    },
    async (base) => {
      await assert.rejects(listModels({ base }), {
        status: 502,
        message: "The server answered with status 502.",
      });
      assert.equal(await readiness({ base }), null);
    },
  ));

test("nobody there", async () => {
  let free;
  await serving(
    () => {},
    async (base) => (free = base),
  );
  await assert.rejects(listModels({ base: free }), { kind: "unreachable" });
  assert.equal(await readiness({ base: free }), null);
});

test("an aborted stream closes its connection", async () => {
  let closed;
  await serving(
    (response) => {
      closed = new Promise((resolve) => response.on("close", resolve));
      response.write(events({ a: 1 }));
    },
    async (base) => {
      const controller = new AbortController();
      const chunks = streamChat({}, { base, signal: controller.signal });
      assert.deepEqual((await chunks.next()).value, { a: 1 });
      controller.abort();
      await assert.rejects(chunks.next(), { name: "AbortError" });
      await closed;
    },
  );
});
