/** Numbers as people read them, never apart from their units. */

/** A size. */
export function bytes(count: number): string {
  if (count < 1000) return `${count}\u00a0B`;
  if (count < 1e6) return `${(count / 1e3).toFixed(0)}\u00a0kB`;
  if (count < 1e9) return `${(count / 1e6).toFixed(1)}\u00a0MB`;
  return `${(count / 1e9).toFixed(2)}\u00a0GB`;
}

/** A duration. */
export function duration(ms: number): string {
  const seconds = Math.max(0, ms / 1000);
  if (seconds < 10) return `${seconds.toFixed(1)}\u00a0s`;
  if (seconds < 90) return `${Math.round(seconds)}\u00a0s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)}\u00a0min ${Math.round(seconds % 60)}\u00a0s`;
  return `${Math.floor(seconds / 3600)}\u00a0h ${Math.round((seconds % 3600) / 60)}\u00a0min`;
}
