-- Set actors aside: they get no lease, and those that they hold are granted to others next.
-- KEYS[1] = state, KEYS[2] = actors set aside, KEYS[3] = leases, KEYS[4] = holders, KEYS[5] = todo, KEYS[6] = heldout
-- ARGV[1] = fence, ARGV[2...] = actor ids
local is_aside = {}
for i = 2, #ARGV do
  redis.call('SADD', KEYS[2], ARGV[i])
  is_aside[ARGV[i]] = true
end
local ids = redis.call('ZRANGE', KEYS[3], 0, -1)
for i = #ids, 1, -1 do
  local holder = redis.call('HGET', KEYS[4], ids[i])
  if holder and is_aside[holder] then
    redis.call('ZREM', KEYS[3], ids[i])
    redis.call('HDEL', KEYS[4], ids[i])
    put_in_front(KEYS[1], KEYS[5], KEYS[6], ids[i])
  end
end
return {'OK'}
