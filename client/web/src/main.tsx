/** The page. */
import { render } from "preact";
import { App } from "./app.tsx";
import { connect } from "./connection.ts";
import { listenForDrops } from "./drops.ts";
import { followHistory } from "./history.ts";
import { stopUnmeantPresses } from "./presses.ts";
import "./page.css";

const root = document.getElementById("app");
if (root === null) throw new Error("the document has no #app");
stopUnmeantPresses();
listenForDrops();
render(<App />, root);
connect();
followHistory();
