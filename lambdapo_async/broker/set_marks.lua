-- What is accepted of every producer, exactly; and what is committed, raised but never lowered.
-- KEYS[1] = state, KEYS[2] = accepted, KEYS[3] = committed
-- ARGV[1] = fence, ARGV[2...] = producer, accepted, committed, ...
redis.call('DEL', KEYS[2])
-- No producer's: without it the numbers are gone.
redis.call('HSET', KEYS[2], '', 0)
for i = 2, #ARGV, 3 do
  local committed = math.max(tonumber(redis.call('HGET', KEYS[3], ARGV[i]) or '0'), tonumber(ARGV[i + 2]))
  redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1])
  redis.call('HSET', KEYS[3], ARGV[i], committed)
end
return {'OK'}
