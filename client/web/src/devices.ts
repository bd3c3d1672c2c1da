/** A server's devices in words: what there is, what each does, and why a job went from one to another. */
import { type Device, DeviceState, type GetServerInfoResponse, type Restarted } from "chromarpc/web";

/** All of them in a few words: the model of one, how many of several work. */
export function devicesOf({
  device,
  devices,
  unavailableBecause,
}: Pick<GetServerInfoResponse, "device" | "devices" | "unavailableBecause">): string {
  if (unavailableBecause) return `no device now: ${unavailableBecause}`;
  if (devices.length < 2) return device?.name ?? "";
  const lost = devices.filter(({ state }) => state === DeviceState.LOST).length;
  return `${devices.length - lost} devices${lost > 0 ? `, ${lost} lost` : ""}`;
}

/** One of them in a line. */
export function deviceLine({
  id,
  name,
  state,
  lostBecause,
}: Pick<Device, "id" | "name" | "state" | "lostBecause">): string {
  const does = DeviceState[state]?.toLowerCase() ?? "unknown";
  return `${id}: ${name}, ${lostBecause ? `${does}: ${lostBecause}` : does}`;
}

/** Why a job began again; once it has ended, only where its pictures may be other ones for it. */
export function whyAgain(
  { movedFrom, bitsMayDiffer }: Pick<Restarted, "movedFrom" | "bitsMayDiffer">,
  hasEnded: boolean,
): string | undefined {
  if (hasEnded && !bitsMayDiffer) return undefined;
  if (movedFrom === "") return "The server was restarted; the job begins again.";
  const next = bitsMayDiffer ? "one of another model, so pictures may differ a little" : "another one";
  return `Device ${movedFrom} was lost; the job begins again on ${next}.`;
}
