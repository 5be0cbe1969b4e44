-- Keep what was sampled of a lease that the actor holds, for whoever holds it next.
-- KEYS[1] = state, KEYS[2] = holders, KEYS[3] = partials (lease id -> "expiry bytes"), KEYS[4] = payload
-- ARGV[1] = actor id, ARGV[2] = lease id, ARGV[3] = payload, ARGV[4] = milliseconds it stays,
-- ARGV[5] = share of the queue's bytes that all of them may take, as a divisor
if redis.call('HGET', KEYS[2], ARGV[2]) ~= ARGV[1] then return {'LOST'} end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local bytes, notes = 0, redis.call('HGETALL', KEYS[3])
for i = 1, #notes, 2 do
  local expiry, size = string.match(notes[i + 1], '^(%d+) (%d+)$')
  if tonumber(expiry) <= now then
    redis.call('HDEL', KEYS[3], notes[i])
  elseif notes[i] ~= ARGV[2] then
    bytes = bytes + tonumber(size)
  end
end
local limit = tonumber(redis.call('HGET', KEYS[1], 'max_bytes') or '0') / tonumber(ARGV[5])
if bytes + #ARGV[3] > limit then return {'FULL'} end
redis.call('SET', KEYS[4], ARGV[3], 'PX', ARGV[4])
redis.call('HSET', KEYS[3], ARGV[2], string.format('%.0f %d', now + tonumber(ARGV[4]), #ARGV[3]))
return {'OK'}
