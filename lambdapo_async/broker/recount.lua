-- Set the counters from what is really there: heals whatever a learner's crash left behind.
-- KEYS[1] = state, KEYS[2] = queue, KEYS[3] = leases, KEYS[4] = todo, KEYS[5] = heldout
-- ARGV[1] = fence, ARGV[2] = consumed, ARGV[3] = first training index never leased in the surviving history
local bytes, training = 0, redis.call('LLEN', KEYS[4])
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], '-', '+')) do
  local fields = entry[2]
  for i = 1, #fields, 2 do
    if fields[i] == 'n' then bytes = bytes + tonumber(fields[i + 1]) end
    if fields[i] == 'l' and string.sub(fields[i + 1], 1, 6) == 'train:' then training = training + 1 end
  end
end
for _, id in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do
  if string.sub(id, 1, 6) == 'train:' then training = training + 1 end
end
-- Held-out answers that the last learner asked for: nobody waits for them any more.
redis.call('DEL', KEYS[5])
local frontier = math.max(tonumber(redis.call('HGET', KEYS[1], 'frontier') or '0'), tonumber(ARGV[3]))
redis.call('HSET', KEYS[1], 'bytes', bytes, 'consumed', ARGV[2], 'admitted', tonumber(ARGV[2]) + training,
           'frontier', frontier)
return {'OK'}
