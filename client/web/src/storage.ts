/** What the browser keeps for this page; a browser that keeps nothing is no error. */

/** A stored value, or another one where nothing usable is stored. */
export function stored<T>(storage: Storage, key: string, otherwise: T): T {
  try {
    const text = storage.getItem(`chromarpc.${key}`);
    if (text === null) return otherwise;
    const value: unknown = JSON.parse(text);
    const isObject = typeof otherwise === "object" && otherwise !== null && !Array.isArray(otherwise);
    if (isObject && typeof value === "object" && value !== null) return { ...otherwise, ...value };
    return typeof value === typeof otherwise ? (value as T) : otherwise;
  } catch {
    return otherwise;
  }
}

/** Keeps a value. */
export function store(storage: Storage, key: string, value: unknown): void {
  try {
    storage.setItem(`chromarpc.${key}`, JSON.stringify(value));
  } catch {
    // A full or forbidden storage: the page works without.
  }
}
