/** How a token and its log-probability are shown. */

/** Spaces and line ends made visible; bytes that are no whole character in hexadecimal. */
export function tokenLabel({ token, bytes }) {
  if (token.includes("\ufffd") && bytes?.length) {
    return bytes.map((byte) => `\\x${byte.toString(16).padStart(2, "0").toUpperCase()}`).join("");
  }
  return token === "" ? "∅" : token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

/** Such as "97.3 %", and "< 0.1 %" for what is unlikely. */
export function percentOf(logprob) {
  const percent = 100 * Math.exp(logprob);
  return percent < 0.1 ? "< 0.1 %" : `${percent.toFixed(1)} %`;
}

/** 0 (certain) to 4 (unlikely), for colour. */
export function doubtOf(logprob) {
  const probability = Math.exp(logprob);
  return [0.9, 0.6, 0.3, 0.1].filter((bound) => probability < bound).length;
}

/** The likeliest, and the one that was drawn if it is not among them. */
export function alternativesOf({ token, bytes, logprob, top_logprobs = [] }) {
  const key = (one) => JSON.stringify(one.bytes ?? one.token);
  const isDrawn = (one) => key(one) === key({ token, bytes });
  const top = top_logprobs.map((one) => ({ ...one, isDrawn: isDrawn(one) }));
  return top.some((one) => one.isDrawn) ? top : [...top, { token, bytes, logprob, isDrawn: true }];
}
