/** The README's example, run as it is written, in a program that installed the package. */
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdir, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import path from "node:path";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { startServer } from "./server.js";

const PACKAGE = fileURLToPath(new URL("../../", import.meta.url));

test("the README's example draws a picture", async () => {
  const readme = await readFile(path.join(PACKAGE, "README.md"), "utf8");
  const example = /```ts\n([\s\S]*?)```/.exec(readme)?.[1];
  assert.ok(example);
  const server = await startServer();
  const folder = await mkdtemp(path.join(tmpdir(), "chromarpc-readme-"));
  try {
    await mkdir(path.join(folder, "node_modules"));
    await symlink(PACKAGE, path.join(folder, "node_modules/chromarpc"));
    // The port alone is another one: somebody may listen on the usual one here.
    await writeFile(
      path.join(folder, "example.mjs"),
      example.replace("http://127.0.0.1:50051", server.target),
    );
    const { stdout } = await promisify(execFile)(process.execPath, ["example.mjs"], { cwd: folder });
    assert.match(stdout, /^25\/25$/m);
    const picture = await readFile(path.join(folder, "out.png"));
    assert.equal(picture.subarray(1, 4).toString(), "PNG");
  } finally {
    await server.stop();
    await rm(folder, { recursive: true, force: true });
  }
});
