"""gptneo_fast inside other people's libraries; each module needs its library and imports it only when it is used."""
