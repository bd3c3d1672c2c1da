/** Builds the page into the server's package, under names that the gateway's routes know. */
import { fileURLToPath } from "node:url";
import { defineConfig } from "vite";

const at = (path: string): string => fileURLToPath(new URL(path, import.meta.url));
const gateway = process.env.CHROMARPC_GATEWAY ?? "http://127.0.0.1:8080";

export default defineConfig({
  base: "./",
  resolve: { alias: { "chromarpc/web": at("../typescript/src/web.ts") } },
  build: {
    target: "es2022",
    outDir: process.env.PAGE_DIR ?? at("../../server/chromarpc_server/gateway/page"),
    emptyOutDir: true,
    modulePreload: { polyfill: false },
    cssCodeSplit: false,
    assetsInlineLimit: 0,
    rollupOptions: {
      output: { entryFileNames: "page.js", assetFileNames: "page[extname]", codeSplitting: false },
    },
  },
  server: { proxy: { "/chromarpc.v1.": gateway, "/v1": gateway, "/health": gateway } },
});
