/** A button that may go away while it has the focus. */
import type { ButtonHTMLAttributes } from "preact";
import { useLayoutEffect, useRef } from "preact/hooks";

interface Props extends ButtonHTMLAttributes {
  /** Gets the focus then; a key pressed once more must do nothing there. */
  readonly heir: () => HTMLElement | null;
}

export function FleetingButton({ heir, ...attributes }: Props) {
  const button = useRef<HTMLButtonElement>(null);
  const newest = useRef(heir);
  newest.current = heir;
  useLayoutEffect(() => {
    const element = button.current;
    return () => {
      if (document.activeElement === element) newest.current()?.focus({ preventScroll: true });
    };
  }, []);
  return <button type="button" ref={button} {...attributes} />;
}

/** Where results are shown: an heir that always stands. */
export function stage(): HTMLElement | null {
  return document.querySelector<HTMLElement>(".stage");
}
