-- Grant leases: held-out ones, then returned ones, then new ones as far as the gate is open.
-- Each lease is also the promise of room in the queue for its answer: no group is sampled that could be refused.
-- KEYS[1] = state, KEYS[2] = leases, KEYS[3] = holders, KEYS[4] = todo, KEYS[5] = heldout, KEYS[6] = the actor's last grant,
-- KEYS[7] = answered
-- ARGV[1] = actor id, ARGV[2] = leases wanted, ARGV[3] = request id,
-- ARGV[4] = actors set aside, which an actor may only read (a script's KEYS count as written)
local state = redis.call('HMGET', KEYS[1], 'phase', 'lease_ms', 'capacity', 'admitted', 'consumed', 'frontier',
                         'server', 'bytes', 'max_bytes', 'group_bytes', 'max_groups', 'queued', 'in_line')
if state[1] ~= 'running' or state[7] ~= server_id() then return {} end
if redis.call('SISMEMBER', ARGV[4], ARGV[1]) == 1 then return {} end
local actor, wanted, lease_ms = ARGV[1], tonumber(ARGV[2]), tonumber(state[2])
local capacity, admitted, consumed, frontier =
  tonumber(state[3]), tonumber(state[4]), tonumber(state[5]), tonumber(state[6])

-- The reply to this very request was lost: the same leases again, those that are still the actor's.
local last_grant = redis.call('GET', KEYS[6])
if last_grant and string.sub(last_grant, 1, #ARGV[3]) == ARGV[3] then
  local still = {}
  for id in string.gmatch(string.sub(last_grant, #ARGV[3] + 1), '%S+') do
    if redis.call('HGET', KEYS[3], id) == actor then still[#still + 1] = id end
  end
  return still
end

local now = now_ms()
-- What expired goes to the front of its line, the oldest first.
local expired = redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now, 'LIMIT', 0, 1000)
for i = #expired, 1, -1 do
  redis.call('ZREM', KEYS[2], expired[i])
  redis.call('HDEL', KEYS[3], expired[i])
  put_in_front(KEYS[1], KEYS[4], KEYS[5], expired[i])
end
if #expired > 0 then redis.call('HINCRBY', KEYS[1], 'expired', #expired) end

local room = math.min(tonumber(state[11]) - tonumber(state[12] or '0'),
                      math.floor((tonumber(state[9]) - tonumber(state[8])) / tonumber(state[10])))
wanted = math.min(wanted, room - redis.call('ZCARD', KEYS[2]))
local granted = {}
-- Mostly nobody is in line.
for _, line in ipairs(tonumber(state[13] or '0') + #expired > 0 and {KEYS[5], KEYS[4]} or {}) do
  while #granted < wanted do
    local id = redis.call('LPOP', line)
    if not id then break end
    granted[#granted + 1] = id
  end
end
if #granted > 0 then count_in_line(KEYS[1], -#granted) end
while #granted < wanted and admitted - consumed < capacity do
  local id = 'train:0:' .. string.format('%.0f', frontier)
  frontier = frontier + 1
  -- An actor may have answered it before Redis lost everything and forgot it.
  if not redis.call('ZSCORE', KEYS[7], id) then
    granted[#granted + 1] = id
    admitted = admitted + 1
  end
end
-- Actors ask again and again at a closed gate: what changes nothing is not written, nor logged.
if frontier ~= tonumber(state[6]) then redis.call('HSET', KEYS[1], 'frontier', frontier, 'admitted', admitted) end
if #granted > 0 then
  local expiries, holders = {}, {}
  for i, id in ipairs(granted) do
    expiries[2 * i - 1], expiries[2 * i] = now + lease_ms, id
    holders[2 * i - 1], holders[2 * i] = id, actor
  end
  redis.call('ZADD', KEYS[2], unpack(expiries))
  redis.call('HSET', KEYS[3], unpack(holders))
  redis.call('SET', KEYS[6], ARGV[3] .. ' ' .. table.concat(granted, ' '), 'PX', lease_ms)
end
return granted
