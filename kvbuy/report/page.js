"use strict";
// The formulas of kvbuy/economics.py and the words of kvbuy/render_cost.py, for the sliders. A test holds them together.

const GB = 1e9, MILLION = 1e6, LOWEST_PRICE = 1e-4;
const WAYS = { prefill: "prefilled", host: "hosted", ship: "shipped" };

const reuseUsd = (c) => c.prefill_usd / c.ratio;
const egressUsd = (c) => c.store_usd_per_fetch + (c.kv_bytes / GB) * c.usd_per_gb;
const residencyUsd = (c) => (c.kv_bytes / GB) * c.usd_per_gb_hour * c.hours;
const storeUsd = (c) => (c.kv_bytes / GB) * c.store_usd_per_gb_hour * c.hours;

function countCosts(c) {
  const reuse = c.loads * reuseUsd(c);
  const host = c.prefill_usd + reuse + residencyUsd(c) + c.loads * c.usd_per_fetch;
  const tariff = (c.tokens / MILLION) * (c.write_usd + (c.loads - 1) * c.read_usd);
  const margin = tariff - host;
  const publisher = c.publisher_share * Math.max(margin, 0);
  return {
    prefill: c.loads * c.prefill_usd,
    ship: c.prefill_usd + reuse + storeUsd(c) + c.loads * egressUsd(c),
    ship_once: c.prefill_usd + reuse + storeUsd(c) + egressUsd(c),
    host,
    uncached: c.loads * (c.tokens / MILLION) * c.input_usd,
    tariff, margin, publisher,
    provider: margin - publisher,
  };
}

function cheapest(costs) {
  return Object.keys(WAYS).reduce((best, way) => (costs[way] < costs[best] ? way : best));
}

function hostingPaysFrom(c) {
  const saving = c.prefill_usd - reuseUsd(c) - c.usd_per_fetch;
  return saving <= 0 ? null : (c.prefill_usd + residencyUsd(c)) / saving;
}

function shippingBeatsPrefillBelow(c) {
  const once = c.prefill_usd + storeUsd(c);
  const saving = c.prefill_usd - reuseUsd(c) - c.store_usd_per_fetch - once / c.loads;
  return Math.max(saving, 0) / (c.kv_bytes / GB);
}

function shippingBeatsHostingBelow(c) {
  const saving = (residencyUsd(c) - storeUsd(c)) / c.loads + c.usd_per_fetch - c.store_usd_per_fetch;
  return Math.max(saving, 0) / (c.kv_bytes / GB);
}

// Python rounds a tie to the even neighbour, and so does this.
const write = (value, options) => value.toLocaleString("en-US", { roundingMode: "halfEven", ...options });
const grouped = (value, digits) => write(value, { minimumFractionDigits: digits, maximumFractionDigits: digits });

function dollars(usd) {
  const sign = usd < 0 ? "-" : "", size = Math.abs(usd);
  if (size >= 1e6) return `${sign}$${grouped(size / 1e6, 2)} M`;
  if (size >= 1 || size === 0) return `${sign}$${grouped(size, 2)}`;
  return `${sign}$${grouped(size, 2 - Math.floor(Math.log10(size)))}`;
}

function count(number) {
  if (number < 1e6 || number % 10000 !== 0) return grouped(number, 0);
  return `${write(number / 1e6, { maximumFractionDigits: 2 })} M`;
}

function loads(number, one = "", many = "") {
  return number === 1 ? `${count(number)} load${one}` : `${count(number)} loads${many}`;
}

function change(c, costs) {
  const pays = hostingPaysFrom(c);
  const belowPrefill = shippingBeatsPrefillBelow(c), belowHosting = shippingBeatsHostingBelow(c);
  switch (cheapest(costs)) {
    case "host": {
      const shipping = dollars(costs.ship) === dollars(costs.host)
        ? "shipping from that store costs the same"
        : belowHosting >= LOWEST_PRICE
          ? `below ${dollars(belowHosting)} a GB shipping is`
          : "only where egress is free does shipping cost as little";
      return `Below ${loads(Math.ceil(pays))} prefill is cheaper; ${shipping}.`;
    }
    case "ship":
      return `Above ${dollars(Math.min(belowPrefill, belowHosting))} a GB it is not.`;
    default: {
      if (c.ratio <= 1) return "Reuse is not faster here, so no price changes that.";
      if (pays === null) return "Prefill costs no more than a load here, so nothing is cheaper.";
      const hosting = `From ${loads(Math.floor(pays) + 1)} on hosting is cheaper`;
      return hosting + (belowPrefill > 0 ? `; below ${dollars(belowPrefill)} a GB shipping is.` : ".");
    }
  }
}

function verdict(c) {
  const costs = countCosts(c), best = cheapest(costs);
  const order = [best, ...Object.keys(WAYS).filter((way) => way !== best)];
  const parts = order.map((way) => `${dollars(costs[way])} ${WAYS[way]}`);
  const name = best[0].toUpperCase() + best.slice(1);
  const less = costs.ship_once < costs[best] && dollars(costs.ship_once) !== dollars(costs[best]);
  const once = less ? ` All at one place: ${dollars(costs.ship_once)}, shipped once.` : "";
  return `${name}: ${loads(c.loads, " costs", " cost")} ${parts.join(", ")}. ${change(c, costs)}${once}`;
}

function show(c) {
  const costs = countCosts(c), best = cheapest(costs);
  const rows = document.querySelectorAll("tr[data-way]");
  const most = Math.max(...Array.from(rows, (row) => costs[row.dataset.way]));
  for (const row of rows) {
    const usd = costs[row.dataset.way];
    row.querySelector(".usd").textContent = dollars(usd);
    row.querySelector(".bar span").style.width = `${most > 0 ? (100 * usd) / most : 0}%`;
    row.classList.toggle("cheapest", row.dataset.way === best);
  }
  for (const cell of document.querySelectorAll("td[data-sum]")) cell.textContent = dollars(costs[cell.dataset.sum]);
  document.getElementById("verdict").textContent = verdict(c);
}

function start(given) {
  const current = { ...given };
  const sliders = {
    agents: { set: (x) => (current.loads = Math.round(10 ** x)), text: () => count(current.loads) },
    egress: { set: (x) => (current.usd_per_gb = x), text: () => dollars(current.usd_per_gb) },
    gpu: {
      set: (x) => (current.prefill_usd = (given.prefill_seconds / 3600) * x),
      text: (x) => dollars(x),
    },
    ratio: { set: (x) => (current.ratio = 10 ** x), text: () => `${grouped(current.ratio, 1)}x` },
  };
  for (const [name, slider] of Object.entries(sliders)) {
    const input = document.getElementById(name);
    const update = (moved) => {
      if (moved) slider.set(Number(input.value)); // untouched, the exact value stays
      input.closest("label").querySelector("output").textContent = slider.text(Number(input.value));
      show(current);
    };
    input.addEventListener("input", () => update(true));
    update(false);
  }
}

// What is folded away is printed all the same.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));

const given = JSON.parse(document.getElementById("case").textContent);
if (given) start(given);
