-- Prelude: which incarnation of the server runs this. A proxy may hide a restart from its clients, but not from here.
local function server_id()
  local info = redis.call('INFO', 'server')
  local _, last = string.find(info, 'run_id:', 1, true)  -- a pattern takes as long as INFO itself
  return last and string.sub(info, last + 1, last + 40) or ''
end
local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
