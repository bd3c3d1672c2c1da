/** The page's own modules in Node, without a browser: Vite reads their TypeScript. */
import { fileURLToPath } from "node:url";
import { createServer } from "vite";

const WEB = fileURLToPath(new URL("../", import.meta.url));

/** Loads modules below `src/`, and what they import, once; `chromarpc` is the client's package. */
export async function load(test, ...names) {
  const server = await createServer({
    root: WEB,
    configFile: `${WEB}vite.config.ts`,
    appType: "custom",
    logLevel: "error",
    server: { middlewareMode: true, watch: null, ws: false },
    optimizeDeps: { noDiscovery: true },
  });
  test.after(() => server.close());
  const modules = await Promise.all(names.map((name) => server.ssrLoadModule(`/src/${name}`)));
  const chromarpc = await server.ssrLoadModule("chromarpc/web");
  return Object.assign({ chromarpc }, ...modules);
}
