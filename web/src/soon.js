/** Runs `work` once, `ms` after it was first requested; then it can be requested again. */
export function soon(ms, work) {
  let timer = null;
  const run = () => {
    timer = null;
    work();
  };
  const cancel = () => clearTimeout(timer);
  const flush = () => {
    if (timer === null) return;
    cancel();
    run();
  };
  return { request: () => (timer ??= setTimeout(run, ms)), cancel, flush };
}
