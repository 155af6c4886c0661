// One client of the server's endpoints: asks for a text and for the weights of the experts at each token, and shows both.
"use strict"
const SVG = "http://www.w3.org/2000/svg"
const at = (id) => document.getElementById(id)
const root = document.body.dataset.root
const routed = "routed" in document.body.dataset
const names = new Map([["seed", "seed"]]) // digest -> name
const colours = new Map() // digest -> class, in the order in which experts lead a word
let words = [] // {element, sum: Map digest -> weight, count}
let messages = [] // of a chat
let text = "" // of a continued text: the prompt, and what followed
let here = -1 // the word that is shown
let running = null
let before = null // the last answer: what there was, for another one in its place
let fresh = true // an answer begins: its first token begins a word

const make = (tag, content = "", kind = "") => {
  const element = document.createElement(tag)
  element.textContent = content
  if (kind) element.className = kind
  return element
}
const draw = (tag, attributes, content = "") => {
  const element = document.createElementNS(SVG, tag)
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value)
  element.textContent = content
  return element
}
const percent = (share) => (share >= 0.9995 ? "100" : (100 * share).toFixed(1)) + " %"
const nameOf = (digest) => names.get(digest) || digest.slice(0, 8)
const mode = () => (document.querySelector("input[name=mode]:checked") || { value: "text" }).value

const headers = () => {
  const key = at("key").value
  return { "Content-Type": "application/json", ...(key ? { Authorization: "Bearer " + key } : {}) }
}

const ask = async (path, body, signal) => {
  const wish = { method: body ? "POST" : "GET", headers: headers(), body: body && JSON.stringify(body), signal }
  const reply = await fetch(root + path, wish).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached: is it still running?")
  })
  if (reply.ok) return reply
  if (reply.status === 401) at("locked").hidden = false
  const told = await reply.json().catch(() => null)
  throw new Error(told && told.error ? told.error.message : "the server answered " + reply.status)
}

// ---- words ------------------------------------------------------------------------------------------------------------

const colourOf = (digest) => {
  if (digest === "seed") return "of-seed"
  if (!colours.has(digest)) colours.set(digest, "c" + (colours.size % 8) + (colours.size % 16 >= 8 ? " second" : ""))
  return colours.get(digest)
}

const shares = (sum) => {
  const total = [...sum.values()].reduce((one, other) => one + other, 0) || 1
  return [...sum].map(([digest, weight]) => [digest, weight / total]).sort((one, other) => other[1] - one[1])
}

// A token begins a word where it begins with a space, or follows one.
const addToken = (paragraph, piece, weights) => {
  const last = words[words.length - 1]
  const joins = !fresh && last && last.element.parentNode === paragraph && !/^\s/.test(piece) && !/\s$/.test(last.element.textContent)
  if (!joins || !piece) {
    if (!piece && last && !fresh) return addWeights(last, weights)
    const space = piece.match(/^\s*/)[0]
    if (space) paragraph.append(space)
    piece = piece.slice(space.length)
    const element = make("span", "", "word")
    element.dataset.place = words.length
    paragraph.append(element)
    words.push({ element, sum: new Map(), count: 0 })
    fresh = false
  }
  const word = words[words.length - 1]
  word.element.textContent += piece
  addWeights(word, weights)
}

const addWeights = (word, weights) => {
  for (const [digest, weight] of Object.entries(weights)) word.sum.set(digest, (word.sum.get(digest) || 0) + weight)
  word.count += 1
  const best = shares(word.sum)[0]
  if (best) word.element.className = "word " + colourOf(best[0]) + (word.element.classList.contains("here") ? " here" : "")
}

const fill = (body, rows) => {
  body.replaceChildren(...rows.map(([digest, ...cells]) => {
    const row = make("tr")
    const head = make("th", "", "")
    head.scope = "row"
    head.append(make("span", "", "mark " + colourOf(digest)))
    if (routed) {
      const button = make("button", nameOf(digest))
      button.type = "button"
      button.title = digest
      button.setAttribute("aria-label", nameOf(digest) + ": let it answer alone")
      button.addEventListener("click", () => { at("model").value = digest; at("prompt").focus() })
      head.append(button)
    } else head.append(nameOf(digest))
    row.append(head, ...cells.map((cell) => make("td", cell, "number")))
    return row
  }))
}

const showAll = () => {
  const sum = new Map()
  const led = new Map()
  for (const word of words) {
    const found = shares(word.sum)
    for (const [digest, weight] of word.sum) sum.set(digest, (sum.get(digest) || 0) + weight)
    if (found.length) led.set(found[0][0], (led.get(found[0][0]) || 0) + 1)
  }
  fill(at("weights").tBodies[0], shares(sum).slice(0, 20).map(([digest, share]) => [digest, percent(share), String(led.get(digest) || 0)]))
}

const show = (place) => {
  if (here >= 0 && words[here]) words[here].element.classList.remove("here")
  here = place
  const word = words[place]
  at("word-weights").hidden = !word
  at("word").textContent = word ? "“" + word.element.textContent.trim() + "”, " + word.count + (word.count === 1 ? " token" : " tokens") : "Point at a word."
  if (!word) return
  word.element.classList.add("here")
  word.element.scrollIntoView({ block: "nearest" })
  fill(at("word-weights").tBodies[0], shares(word.sum).map(([digest, share]) => [digest, percent(share)]))
}

at("text").addEventListener("pointerover", (event) => {
  if (event.target.dataset.place) show(Number(event.target.dataset.place))
})
at("text").addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1, Home: -words.length, End: words.length }[event.key]
  if (!step || !words.length) return
  event.preventDefault()
  show(Math.min(words.length - 1, Math.max(0, here + step)))
})

// ---- asking -----------------------------------------------------------------------------------------------------------

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader()
  let left = ""
  for (;;) {
    const { value, done } = await reader.read()
    if (done) throw new Error("the server ended the answer before its end: ask again")
    const lines = (left + value).split("\n\n")
    left = lines.pop()
    for (const line of lines) {
      const data = line.replace(/^data: /, "")
      if (data === "[DONE]") return
      yield JSON.parse(data)
    }
  }
}

const paragraph = (who, content) => {
  const made = make("p")
  if (who) made.append(make("span", who, "who"))
  if (content) made.append(make("span", content, "given"))
  at("text").append(made)
  return made
}

const send = async () => {
  const prompt = at("prompt").value
  if (running || (!prompt && !text && !messages.length)) return
  const chat = mode() === "chat"
  at("trouble").hidden = true
  const body = {
    model: routed ? at("model").value.trim() || "auto" : "auto", max_tokens: Number(at("tokens").value) || 96,
    temperature: Number(at("temperature").value), stream: true, stream_options: { include_usage: true },
    elmwood: { provenance: true, tokens: true },
  }
  const asked = chat ? [...messages, { role: "user", content: prompt }] : text + prompt
  if (at("seed").value) body.seed = Number(at("seed").value)
  if (chat) body.messages = asked
  else body.prompt = asked
  running = new AbortController()
  before = { prompt, messages, text, words: words.length, parts: at("text").childNodes.length, rest: (at("text").lastChild || at("text")).childNodes.length }
  fresh = true
  at("go").disabled = true
  at("again").hidden = true
  at("stop").hidden = false
  at("state").textContent = "asking"
  let said = ""
  let place = null
  let ending = ""
  try {
    const reply = await ask(chat ? "/v1/chat/completions" : "/v1/completions", body, running.signal)
    at("prompt").value = ""
    if (chat) {
      paragraph("you", prompt)
      place = paragraph("model", "")
    } else {
      place = at("text").lastElementChild || paragraph("", "")
      if (prompt) place.append(make("span", prompt, "given"))
    }
    for await (const part of events(reply)) {
      if (part.error) throw new Error(part.error.message)
      if (part.usage) at("state").textContent = part.usage.completion_tokens + " tokens" + ending
      const choice = part.choices[0]
      if (!choice) continue
      const found = choice.elmwood || {}
      for (const expert of [...(found.experts || []), ...(found.candidates || [])]) names.set(expert.id, expert.name)
      const before = [...said].length
      said += (chat ? choice.delta.content : choice.text) || ""
      const tokens = found.by_token || []
      const points = [...said] // places count characters, not halves of them
      const rest = points.slice(before, tokens.length ? tokens[0].start : points.length).join("")
      if (rest) addToken(place, rest, {}) // of tokens that came before
      tokens.forEach((token, n) => {
        const end = n + 1 < tokens.length ? tokens[n + 1].start : points.length
        addToken(place, points.slice(token.start, end).join(""), token.weights)
      })
      if (choice.finish_reason) ending = choice.finish_reason === "length" ? ", as many as asked for" : ", the model ended the text"
      showAll()
    }
  } catch (error) {
    if (error.name === "AbortError") at("state").textContent = "stopped"
    else {
      at("state").textContent = ""
      at("trouble").textContent = error.message
      at("trouble").hidden = false
    }
  }
  running = null
  at("go").disabled = false
  at("stop").hidden = true
  at("again").hidden = at("copy").hidden = !place
  if (!place) return
  if (chat) messages = [...asked, { role: "assistant", content: said }]
  else text = asked + said
  look()
  await showMap(chat ? said : text)
}

const answer = async () => {
  if (running) return
  await send()
  document.body.dataset.answers = Number(document.body.dataset.answers || 0) + 1
}

const stop = () => running && running.abort()

// Another answer in the place of the last one.
const again = () => {
  if (running || !before) return
  words.length = before.words
  const last = at("text").childNodes[before.parts - 1]
  while (at("text").childNodes.length > before.parts) at("text").lastChild.remove()
  while (last && last.childNodes.length > before.rest) last.lastChild.remove()
  messages = before.messages
  text = before.text
  at("prompt").value = before.prompt
  show(-1)
  return answer()
}

const copy = async () => {
  const said = at("text").innerText.trim()
  try {
    await navigator.clipboard.writeText(said)
  } catch { // not on this machine and without TLS
    getSelection().selectAllChildren(at("text"))
    document.execCommand("copy")
  }
  at("state").textContent = "copied"
}

const clear = () => {
  stop()
  before = null
  at("again").hidden = at("copy").hidden = true
  words = []
  messages = []
  text = ""
  here = -1
  colours.clear()
  at("text").replaceChildren()
  at("state").textContent = ""
  at("trouble").hidden = true
  if (at("map-part")) at("map-part").hidden = true
  showAll()
  show(-1)
  at("prompt").focus()
}

// ---- the map ----------------------------------------------------------------------------------------------------------

const showMap = async (whole) => {
  if (!routed || !whole) return
  const route = await ask("/v1/route", { prompt: whole, map: true, most: 1000 }).then((reply) => reply.json()).catch(() => null)
  at("map-part").hidden = !(route && route.map)
  if (!route || !route.map) return
  const place = (x, y) => [20 + 360 * x, 280 - 260 * y]
  const nearest = new Map(route.candidates.slice(0, 9).map((one, n) => [one.id, n]))
  const circles = []
  const labels = []
  for (const expert of route.map.experts) {
    names.set(expert.id, expert.name)
    const [x, y] = place(expert.x, expert.y)
    const circle = draw("circle", { cx: x, cy: y, r: colours.has(expert.id) ? 7 : 4, class: colours.get(expert.id) || "idle" })
    circle.append(draw("title", {}, expert.name))
    circles.push(circle)
    if (nearest.has(expert.id)) labels.push({ x, y, name: expert.name, rank: nearest.get(expert.id) })
  }
  const ways = []
  const path = route.map.path.map(([x, y]) => place(x, y))
  if (path.length) {
    ways.push(draw("polyline", { points: path.map((point) => point.join(",")).join(" ") }))
    ways.push(draw("circle", { cx: path[0][0], cy: path[0][1], r: 5, class: "start" }))
    ways.push(draw("circle", { cx: path.at(-1)[0], cy: path.at(-1)[1], r: 4, class: "end" }))
  }
  at("map").replaceChildren(...circles, ...ways)
  label(labels.sort((one, other) => one.rank - other.rank), circles)
}

// Names beside their circles, the nearest first: where there is no room for one without covering another name or a circle, it is left out.
const label = (labels, circles) => {
  const taken = circles.map((one) => {
    const [x, y, r] = ["cx", "cy", "r"].map((name) => Number(one.getAttribute(name)))
    return { left: x - r, right: x + r, top: y - r, bottom: y + r }
  })
  for (const { x, y, name } of labels) {
    const written = draw("text", { x: 0, y: 0 }, name.length > 30 ? name.slice(0, 29) + "…" : name)
    at("map").append(written)
    const { width, height } = written.getBBox()
    const middle = x - width / 2
    const inside = Math.min(Math.max(middle, 4), 396 - width)
    const spots = [
      [inside, y - 10 - height], [inside, y + 10], [x + 10, y - height / 2], [x - 10 - width, y - height / 2],
      [x + 7, y - 7 - height], [x + 7, y + 7], [x - 7 - width, y - 7 - height], [x - 7 - width, y + 7],
      [inside, y - 16 - 2 * height], [inside, y + 16 + height],
    ]
    const spot = spots.map(([left, top]) => ({ left, top, right: left + width, bottom: top + height })).find((one) =>
      one.left >= 3 && one.right <= 397 && one.top >= 3 && one.bottom <= 297 &&
      taken.every((other) => one.left >= other.right || one.right <= other.left || one.top >= other.bottom || one.bottom <= other.top))
    if (!spot) {
      written.remove()
      continue
    }
    taken.push(spot)
    written.setAttribute("x", spot.left)
    written.setAttribute("y", spot.top + 0.78 * height)
  }
}

// ---- newer models -----------------------------------------------------------------------------------------------------

// The server may go on to a newer model while the page is open: /readyz says which one it is.
const look = async () => {
  if (document.hidden) return
  const ready = await fetch(root + "/readyz").then((reply) => (reply.ok ? reply.json() : null)).catch(() => null)
  if (!ready || !ready.model || ready.model === document.body.dataset.model) return
  document.body.dataset.model = ready.model
  const page = await ask("/v1/experts?limit=1").then((reply) => reply.json()).catch(() => null)
  const count = page && page.total ? page.total.toLocaleString("en") + (page.total === 1 ? " expert" : " experts") : ""
  if (count && at("count")) at("count").textContent = count
  at("newer").textContent = "A newer model answers since " + new Date().toLocaleTimeString() + (count ? ", of " + count : "") + "."
}
setInterval(look, 15000)
document.addEventListener("visibilitychange", look)

// ---- wiring -----------------------------------------------------------------------------------------------------------

at("ask").addEventListener("submit", (event) => { event.preventDefault(); answer() })
at("stop").addEventListener("click", stop)
at("again").addEventListener("click", again)
at("copy").addEventListener("click", copy)
at("clear").addEventListener("click", clear)
document.querySelectorAll("input[name=mode]").forEach((one) => one.addEventListener("change", () => {
  clear()
  at("go").textContent = mode() === "chat" ? "Send" : "Continue"
  at("prompt").placeholder = mode() === "chat" ? "Say something" : "Begin a text; the model continues it"
}))
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stop()
  const chatting = mode() === "chat" && event.target === at("prompt") && !event.shiftKey && !event.isComposing
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || chatting)) { event.preventDefault(); answer() }
})
if (routed) {
  let asked = ""
  const suggest = async () => {
    const query = at("model").value.trim()
    if (query === asked) return
    asked = query
    const wanted = query === "auto" || query === "seed" ? "" : query
    const page = await ask("/v1/experts?limit=20&q=" + encodeURIComponent(wanted)).then((reply) => reply.json()).catch(() => null)
    if (!page) return
    const fixed = [["auto", "the router chooses"], ["seed", "the seed alone"]]
    at("experts").replaceChildren(...[...fixed, ...page.data.map((card) => [card.id, card.name])].map(([value, label]) => {
      const option = make("option", label)
      option.value = value
      return option
    }))
    for (const card of page.data) names.set(card.id, card.name)
  }
  at("model").addEventListener("input", suggest)
  at("model").addEventListener("focus", suggest)
}
