import { useEffect, useReducer, useState } from "preact/hooks";

/** The session's state; the component is drawn again whenever it changes. */
export function useSession(session) {
  const [, redraw] = useReducer((count) => count + 1, 0);
  useEffect(() => session.subscribe(redraw), [session]);
  return session.state;
}

/** Whether a media query holds now. */
export function useMedia(query) {
  const [holds, setHolds] = useState(() => matchMedia(query).matches);
  useEffect(() => {
    const list = matchMedia(query);
    const update = () => setHolds(list.matches);
    list.addEventListener("change", update);
    return () => list.removeEventListener("change", update);
  }, [query]);
  return holds;
}
