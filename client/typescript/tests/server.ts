/** A real server with the bundled checkpoint, for tests; and a door to it that can be shut. */
import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import path from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const ROOT = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "../../../..");
const COMMAND = process.env.CHROMARPC_SERVER ?? path.join(ROOT, ".venv/bin/chromarpc-server");

/** The folder of adapters that servers of tests have. */
export const LORA_ROOT = path.join(ROOT, "server/chromarpc_server/assets/loras");

export interface TestServer {
  /** As the server prints it. */
  readonly address: string;
  readonly port: number;
  readonly target: string;
  stop(): Promise<void>;
}

/** Starts a server and waits until it takes requests. */
export async function startServer(...flags: string[]): Promise<TestServer> {
  const data = await mkdtemp(path.join(tmpdir(), "chromarpc-test-"));
  const server: ChildProcess = spawn(
    COMMAND,
    [
      ...["--port", "0", "--preload", "chroma-mini", "--lora-root", LORA_ROOT, "--data-dir", data],
      ...["--threads", "2", "--grace-s", "0", "--log-level", "warning", ...flags],
    ],
    { stdio: ["ignore", "pipe", "inherit"] },
  );
  if (server.stdout === null) throw new Error("no standard output");
  for await (const line of createInterface(server.stdout)) {
    const address = / listens on (\S+)/.exec(line)?.[1];
    if (address === undefined) continue;
    const port = /:(\d+)$/.exec(address)?.[1] ?? "0";
    server.stdout.resume();
    return {
      address,
      port: Number(port),
      target: `http://127.0.0.1:${port}`,
      async stop() {
        if (server.exitCode === null) {
          const exit = once(server, "exit");
          server.kill("SIGTERM");
          await exit;
        }
        await rm(data, { recursive: true, force: true });
      },
    };
  }
  throw new Error(`the server did not start (exit code ${server.exitCode})`);
}

/** A way to a server whose connections can be cut. */
export interface Door {
  readonly target: string;
  /** Cuts every connection and lets none in. */
  shut(): void;
  /** Lets connections in again. */
  open(): void;
  close(): Promise<void>;
}

/** Puts a door before a server. */
export async function doorTo(port: number): Promise<Door> {
  const sockets = new Set<Socket>();
  let isShut = false;
  const listener = createServer((client) => {
    if (isShut) {
      client.destroy();
      return;
    }
    const server = connect(port, "127.0.0.1");
    for (const socket of [client, server]) {
      sockets.add(socket);
      socket.on("error", () => undefined);
      socket.on("close", () => {
        sockets.delete(socket);
        client.destroy();
        server.destroy();
      });
    }
    client.pipe(server).pipe(client);
  });
  listener.listen(0, "127.0.0.1");
  await once(listener, "listening");
  const address = listener.address();
  if (address === null || typeof address === "string") throw new Error("no port");
  return {
    target: `http://127.0.0.1:${address.port}`,
    shut() {
      isShut = true;
      for (const socket of sockets) socket.destroy();
    },
    open() {
      isShut = false;
    },
    async close() {
      for (const socket of sockets) socket.destroy();
      listener.close();
      await once(listener, "close");
    },
  };
}
