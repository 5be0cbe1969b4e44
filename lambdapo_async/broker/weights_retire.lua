-- Take files off the list, so that no new reader comes; returns name, manifest, name, manifest, ... of every file
-- that is on no list and that nobody reads, what an earlier call retired and a crash left included.
-- KEYS[1] = state, KEYS[2] = files listed, KEYS[3] = files begun, KEYS[4] = readers
-- ARGV[1] = fence, ARGV[2...] = names
for i = 2, #ARGV do redis.call('HDEL', KEYS[2], ARGV[i]) end
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', time[1] * 1000 + math.floor(time[2] / 1000))
local is_read = {}
for _, member in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
  is_read[string.match(member, '^([^|]+)|')] = true
end
local free = {'OK'}
for _, name in ipairs(redis.call('HKEYS', KEYS[3])) do
  if not is_read[name] and redis.call('HEXISTS', KEYS[2], name) == 0 then
    free[#free + 1] = name
    free[#free + 1] = redis.call('HGET', KEYS[3], name)
  end
end
return free
