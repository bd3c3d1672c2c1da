/** Says what was just taken away, and brings it back. */
import { FleetingButton, stage } from "./fleeting-button.tsx";
import { expired, failure, hold, removals, undo } from "./undo.ts";

export function UndoView() {
  const removal = removals.value.at(-1);
  const notice = removal?.notice ?? expired.value;
  return (
    <div class="notices">
      <div role="alert">
        {failure.value !== undefined && (
          <p class="notice error">
            <span>Not deleted: {failure.value}</span>
            <FleetingButton
              heir={stage}
              onClick={() => {
                failure.value = undefined;
              }}
            >
              Dismiss
            </FleetingButton>
          </p>
        )}
      </div>
      <div role="status">
        {notice !== undefined && (
          <p
            class="notice"
            onPointerEnter={(event) => event.pointerType === "mouse" && hold(true)}
            onPointerLeave={(event) => event.pointerType === "mouse" && hold(false)}
            onFocusIn={() => hold(true)}
            onFocusOut={() => hold(false)}
          >
            <span>{notice}</span>
            <FleetingButton heir={stage} data-once aria-disabled={removal === undefined} onClick={undo}>
              Undo
            </FleetingButton>
          </p>
        )}
      </div>
    </div>
  );
}
