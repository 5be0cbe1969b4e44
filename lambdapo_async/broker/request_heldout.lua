-- Offer held-out leases. One that is waiting or held already will be answered anyway.
-- KEYS[1] = state, KEYS[2] = heldout, KEYS[3] = leases, KEYS[4] = answered
-- ARGV[1] = fence, ARGV[2...] = lease ids
for i = 2, #ARGV do
  redis.call('ZREM', KEYS[4], ARGV[i])
  if not redis.call('ZSCORE', KEYS[3], ARGV[i]) and not redis.call('LPOS', KEYS[2], ARGV[i]) then
    redis.call('RPUSH', KEYS[2], ARGV[i])
    count_in_line(KEYS[1], 1)
  end
end
return {'OK'}
