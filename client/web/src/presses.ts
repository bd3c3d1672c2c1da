/**
 * Presses that nobody meant: a key that is held down, and a second click that meets what came under the cursor just
 * now. Every button has one meaning for as long as it stands; this is for what moves into its place.
 */

/** What the first click of a row met. */
let first: Element | null = null;

/**
 * Stops them before any control sees them. The second click of a double click counts only on the control that the
 * first one met, and not even there where the control is marked with `data-once`.
 */
export function stopUnmeantPresses(): void {
  document.addEventListener("click", judgeClick, { capture: true });
  document.addEventListener("keydown", judgeKey, { capture: true });
}

function judgeClick(event: MouseEvent): void {
  const control = event.target instanceof Element ? event.target.closest("button, a") : null;
  // The browser counts the clicks of one place; a key's are 0.
  if (event.detail === 1) first = control;
  if (event.detail < 2 || control === null) return;
  if (control !== first || control.hasAttribute("data-once")) stop(event);
}

function judgeKey(event: KeyboardEvent): void {
  if (event.key !== "Enter" || !event.repeat) return;
  const isNewLine = event.target instanceof HTMLTextAreaElement && !event.ctrlKey && !event.metaKey;
  if (!isNewLine) stop(event);
}

function stop(event: Event): void {
  event.preventDefault();
  event.stopPropagation();
}
