/** An answer that is being written: its text so far, and how fast it comes. */
export class Answer {
  content = "";
  reasoning = "";
  finishReason = null;
  tokens = []; // with log-probabilities, if they were asked for
  #numTokens = 0;
  #startedAt;
  #firstAt = null;
  #lastAt = null;

  /** Times are in milliseconds, of one clock. */
  constructor(startedAt) {
    this.#startedAt = startedAt;
  }

  take(chunk, now) {
    if (chunk.usage) this.#numTokens = chunk.usage.completion_tokens;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { delta = {}, logprobs, finish_reason } = choice;
    const text = (delta.content ?? "") + (delta.refusal ?? "");
    const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
    this.content += text;
    this.reasoning += reasoning;
    this.tokens.push(...(logprobs?.content ?? []));
    this.finishReason = finish_reason ?? this.finishReason;
    if (text || reasoning) {
      this.#firstAt ??= now;
      this.#lastAt = now;
    }
  }

  /** Number of tokens, seconds to the first one, tokens a second after it; null where not known. */
  get stats() {
    const seconds = (this.#lastAt - this.#firstAt) / 1000;
    const rate = this.#numTokens > 1 && seconds > 0 ? (this.#numTokens - 1) / seconds : null;
    return {
      numTokens: this.#numTokens || null,
      ttft: this.#firstAt === null ? null : (this.#firstAt - this.#startedAt) / 1000,
      rate,
    };
  }
}

/** Such as "34 tokens · 212 tokens/s · first token after 41 ms". */
export function describeStats({ numTokens, ttft, rate }) {
  return [
    numTokens !== null && `${numTokens} ${numTokens === 1 ? "token" : "tokens"}`,
    rate !== null && `${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`,
    ttft !== null &&
      `first token after ${ttft < 1 ? `${Math.round(1000 * ttft)} ms` : `${ttft.toFixed(1)} s`}`,
  ]
    .filter(Boolean)
    .join(" · ");
}
