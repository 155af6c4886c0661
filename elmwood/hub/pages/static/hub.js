// Pages poll only while their tab is visible, and while "update by itself" is on.
"use strict"
document.addEventListener("htmx:beforeRequest", (event) => {
  const live = document.getElementById("live")
  const polls = event.target.closest("[data-poll]")
  if (polls && (document.hidden || (live && !live.checked))) event.preventDefault()
})
document.addEventListener("DOMContentLoaded", () => {
  const live = document.getElementById("live")
  if (!live) return
  live.checked = localStorage.getItem("live") !== "off"
  live.addEventListener("change", () => localStorage.setItem("live", live.checked ? "on" : "off"))
})
