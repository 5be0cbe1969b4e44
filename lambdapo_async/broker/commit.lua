-- Forget groups that are durable at the learner, and raise (never lower) the marks that tell their actors.
-- KEYS[1] to KEYS[8] = see synced.lua, KEYS[9...] = payloads
-- ARGV[1] to ARGV[3] = see synced.lua, ARGV[4] = number of marks, then producer, mark, ...,
-- then for each payload: stream id, 1 for a duplicate training group else 0, its bytes
local first = 5 + 2 * tonumber(ARGV[4])
local num_bytes, removed, duplicates = 0, 0, 0
-- Deleting comes first: a full Redis allows a script's other writes only after it.
for i = 9, #KEYS do
  local at = first + 3 * (i - 9)
  if redis.call('XDEL', KEYS[2], ARGV[at]) == 1 then
    -- As it was counted: the payload itself may be gone.
    num_bytes = num_bytes + tonumber(ARGV[at + 2])
    redis.call('UNLINK', KEYS[i])
    removed, duplicates = removed + 1, duplicates + tonumber(ARGV[at + 1])
  end
end
for i = 5, first - 1, 2 do
  local producer, mark = ARGV[i], tonumber(ARGV[i + 1])
  for key = 3, 4 do
    if tonumber(redis.call('HGET', KEYS[key], producer) or '0') < mark then
      redis.call('HSET', KEYS[key], producer, mark)
    end
  end
end
local ticks = tonumber(synced[2]) + 1
-- Every command of a script is a record of the server's log: one is cheaper than five.
redis.call('HSET', KEYS[1], 'bytes', tonumber(synced[5] or '0') - num_bytes, 'queued', tonumber(synced[3]) - removed,
           'admitted', tonumber(synced[6] or '0') - duplicates, 'seen', now_ms(), 'ticks', ticks)
return {'OK', ticks}
