/** The server, as the page needs it: its models, whether it is ready, and answers as they are written. */
import { EventParser } from "./sse.js";

/** `kind`: "unreachable", "refused" (an HTTP status), "failed" (an error event), "cut" (no end came). */
export class ApiError extends Error {
  constructor(kind, message, status = 0) {
    super(message);
    this.name = "ApiError";
    this.kind = kind;
    this.status = status;
  }
}

export async function listModels({ base = "", key = "" } = {}) {
  const response = await ask(`${base}v1/models`, { headers: headersOf(key) });
  const { data } = await response.json();
  return data.map((model) => model.id);
}

/** What /readyz says, whatever its status; null when nobody answers. */
export async function readiness({ base = "" } = {}) {
  try {
    return await (await fetch(`${base}readyz`, { cache: "no-store" })).json();
  } catch {
    return null;
  }
}

/** The chunks of a streamed answer. Throws ApiError, and AbortError once `signal` is aborted. */
export async function* streamChat(body, { base = "", key = "", signal } = {}) {
  const response = await ask(`${base}v1/chat/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", ...headersOf(key) },
    body: JSON.stringify(body),
    signal,
  });
  const parser = new EventParser();
  for await (const bytes of chunksOf(response.body)) {
    for (const data of parser.push(bytes)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError("failed", chunk.error.message, 200);
      yield chunk;
    }
  }
  throw new ApiError("cut", "The connection closed before the answer was complete.");
}

function headersOf(key) {
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function ask(url, options) {
  let response;
  try {
    response = await fetch(url, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("unreachable", "The server does not answer.");
  }
  if (!response.ok) throw new ApiError("refused", await messageOf(response), response.status);
  return response;
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

async function* chunksOf(stream) {
  const reader = stream.getReader();
  try {
    while (true) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("cut", "The connection to the server was lost.");
  } finally {
    reader.cancel().catch(() => {}); // of a stream that has failed already
  }
}
