/** The tree of errors against the contract's reasons. */
import assert from "node:assert/strict";
import { test } from "node:test";
import { Code } from "@connectrpc/connect";
import { statusError } from "../src/errors.js";
import { ErrorReason } from "../src/v1.js";

const CODES = Object.values(Code).filter((code): code is Code => typeof code === "number");
const REASONS = Object.values(ErrorReason).filter(
  (name) => typeof name === "string" && name !== "UNSPECIFIED",
);
/** Reasons that say no more than their codes; all others have a class of their own. */
const GENERAL: Readonly<Record<string, string>> = {
  INVALID_PARAMETER: "InvalidRequest",
  UNAUTHENTICATED: "AccessDenied",
  INTERNAL: "ServerError",
};

function className(reason: string): string {
  const words = reason.split("_").map((word) => word.charAt(0) + word.slice(1).toLowerCase());
  return GENERAL[reason] ?? words.join("");
}

test("every reason of the contract has a class", () => {
  assert.ok(REASONS.length > 30);
  for (const reason of REASONS.map(String)) {
    const found = CODES.filter((code) => statusError("no", { code, reason }).name === className(reason));
    assert.ok(found.length > 0, reason);
    for (const code of found) assert.equal(statusError("no", { code, reason }).reason, reason);
  }
});

test("a reason that contradicts its code narrows nothing", () => {
  assert.equal(statusError("no", { code: Code.Internal, reason: "QUEUE_FULL" }).name, "ServerError");
  assert.equal(
    statusError("no", { code: Code.Unavailable, reason: "OF_A_NEWER_SERVER" }).name,
    "ServerUnavailable",
  );
});
