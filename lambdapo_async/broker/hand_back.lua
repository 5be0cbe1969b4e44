-- Put leases that the actor holds at the front of their lines, in the order given.
-- KEYS[1] = state, KEYS[2] = leases, KEYS[3] = holders, KEYS[4] = todo, KEYS[5] = heldout
-- ARGV[1] = actor id, ARGV[2...] = lease ids
for i = #ARGV, 2, -1 do
  if redis.call('HGET', KEYS[3], ARGV[i]) == ARGV[1] then
    redis.call('ZREM', KEYS[2], ARGV[i])
    redis.call('HDEL', KEYS[3], ARGV[i])
    put_in_front(KEYS[1], KEYS[4], KEYS[5], ARGV[i])
  end
end
return {}
