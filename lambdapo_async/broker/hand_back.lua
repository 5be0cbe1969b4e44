-- Put leases that the actor holds at the front of their lines, in the order given.
-- KEYS[1] = leases, KEYS[2] = holders, KEYS[3] = todo, KEYS[4] = heldout
-- ARGV[1] = actor id, ARGV[2...] = lease ids
for i = #ARGV, 2, -1 do
  if redis.call('HGET', KEYS[2], ARGV[i]) == ARGV[1] then
    redis.call('ZREM', KEYS[1], ARGV[i])
    redis.call('HDEL', KEYS[2], ARGV[i])
    redis.call('LPUSH', string.sub(ARGV[i], 1, 6) == 'train:' and KEYS[3] or KEYS[4], ARGV[i])
  end
end
return {}
