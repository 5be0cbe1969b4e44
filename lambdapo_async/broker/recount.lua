-- Make leases, lines and counters agree with what the learner holds and with what is really in the queue.
-- Afterwards every training index below the frontier is received, queued, leased or in line.
-- KEYS[1] = state, KEYS[2] = queue, KEYS[3] = leases, KEYS[4] = holders, KEYS[5] = todo, KEYS[6] = heldout,
-- KEYS[7] = answered
-- ARGV[1] = fence, ARGV[2] = consumed, ARGV[3] = waiting, ARGV[4] = next index, ARGV[5...] = holes below it, ascending
local consumed, next_index = tonumber(ARGV[2]), tonumber(ARGV[4])
local frontier = math.max(tonumber(redis.call('HGET', KEYS[1], 'frontier') or '0'), next_index)
-- More than the gate ever let out is damage, and each index costs us a place in line.
if frontier - next_index > 1048576 then frontier = next_index end
local missing = {}
for i = 5, #ARGV do missing[#missing + 1] = 'train:0:' .. ARGV[i] end
for index = next_index, frontier - 1 do missing[#missing + 1] = 'train:0:' .. string.format('%.0f', index) end
local is_open, is_there = {}, {}
for _, id in ipairs(missing) do is_open[id] = true end
-- Neither received nor given out twice.
local function is_stale(id)
  return is_training(id) and not is_open[id]
end

local bytes, queued, training = 0, 0, 0
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '-', '+')) do
  local fields = entry[2]
  queued = queued + 1
  for i = 1, #fields, 2 do
    if fields[i] == 'n' then bytes = bytes + (tonumber(fields[i + 1]) or 0) end
    if fields[i] == 'l' and is_training(fields[i + 1]) then
      training, is_there[fields[i + 1]] = training + 1, true
    end
  end
end

-- Answers that were lost since: the next ones are welcome.
for _, id in ipairs(redis.call('ZRANGE', KEYS[7], 0, -1)) do
  local index = tonumber(string.match(id, '^train:0:(%d+)$'))
  if index and not is_there[id] and (is_open[id] or index >= frontier) then redis.call('ZREM', KEYS[7], id) end
end

local is_leased, expiry = {}, now_ms() + tonumber(redis.call('HGET', KEYS[1], 'lease_ms'))
for _, id in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  if is_stale(id) or is_there[id] or redis.call('HEXISTS', KEYS[4], id) == 0 then
    redis.call('ZREM', KEYS[3], id)
  else
    is_leased[id] = true
    if is_training(id) then
      training, is_there[id] = training + 1, true
    end
    -- Its actor could not renew it while the queue was closed.
    redis.call('ZADD', KEYS[3], expiry, id)
  end
end
for _, id in ipairs(redis.call('HKEYS', KEYS[4])) do
  if not is_leased[id] then redis.call('HDEL', KEYS[4], id) end
end

redis.call('HSET', KEYS[4], '', '')

-- Lost ones first, then what was in line already.
local in_line, line = redis.call('LRANGE', KEYS[5], 0, -1), {}
for _, id in ipairs(in_line) do is_there[id] = is_there[id] or 'line' end
for _, id in ipairs(missing) do
  if not is_there[id] then line[#line + 1] = id end
end
for _, id in ipairs(in_line) do
  if is_there[id] == 'line' and not is_stale(id) then
    line[#line + 1], is_there[id] = id, true
  end
end
redis.call('DEL', KEYS[5])
for _, id in ipairs(line) do redis.call('RPUSH', KEYS[5], id) end

-- Held-out answers that the last learner asked for: nobody waits for them any more.
redis.call('DEL', KEYS[6])
redis.call('HSET', KEYS[1], 'bytes', bytes, 'queued', queued, 'in_line', #line, 'consumed', consumed,
           'frontier', frontier, 'admitted', consumed + tonumber(ARGV[3]) + training + #line)
return {'OK'}
